"""Transformers' caches hold latents and index keys, and shared layers hold no index keys."""

import pytest
import torch
from testing.tiny_models import tiny_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticIndexedLayer

from indexcache.modeling_indexcache.cache.latent_cache import append_latents
from indexcache.modeling_indexcache.forward_plan import ForwardPlan

PATTERN = "FSSF"


@pytest.fixture(scope="module")
def model():
    return tiny_model(index_share_pattern=PATTERN)


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(4)
    return torch.randint(2, 96, (3, 40))


def fill(model, ids, cache):
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_layers_hold_one_latent_row_a_token_and_index_keys_only_when_full(model, ids, kind):
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=50)
    fill(model, ids, cache)
    slots = 40 if kind == "dynamic" else 50
    for letter, layer in zip(PATTERN, cache.layers):
        assert layer.keys.shape == (3, 1, slots, config.kv_lora_rank + config.qk_rope_head_dim)
        assert layer.values.numel() == 0
        if letter == "F":
            assert layer.indexer_keys.shape == (3, slots, config.index_head_dim)
        else:
            assert layer.indexer_keys is None


def test_index_keys_are_cached_below_top_k_too(model, ids):
    """Selection starts only later, and needs the keys of the first tokens then."""
    with torch.no_grad():
        expected = model(ids).logits[:, 5:]
        cache = fill(model, ids[:, :5], DynamicCache(config=model.config))
        got = model(ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_crop_forgets_the_last_tokens(model, ids):
    with torch.no_grad():
        expected = model(ids).logits[:, 25:]
        cache = fill(model, torch.cat((ids[:, :25], ids[:, :9]), dim=1), DynamicCache(config=model.config))
        cache.crop(-9)
        assert cache.get_seq_length() == 25
        got = model(ids[:, 25:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reorder_moves_whole_sequences(model, ids, kind):
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=50)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = model(ids[order]).logits[:, 30:]
        fill(model, ids[:, :30], cache).reorder_cache(order)
        got = model(ids[order, 30:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_repeat_and_select_batches(model, ids):
    cache = fill(model, ids[:, :30], DynamicCache(config=model.config))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 5]))
    with torch.no_grad():
        got = model(ids[[0, 2], 30:], past_key_values=cache).logits
        expected = model(ids[[0, 2]]).logits[:, 30:]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_static_cache_can_be_reset_and_used_again(model, ids):
    cache = fill(model, ids.flip(0), StaticCache(config=model.config, max_cache_len=41))
    cache.reset()
    with torch.no_grad():
        got = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_static_layer_counts_where_its_rows_are_before_it_would_copy_its_count_there(model, monkeypatch):
    """On a GPU that copy would wait for everything queued; the meta device stands for one."""
    counted = []
    initialise = StaticIndexedLayer.lazy_initialization
    monkeypatch.setattr(
        StaticIndexedLayer,
        "lazy_initialization",
        lambda self, *rows: (counted.append(self.cumulative_length.device.type), initialise(self, *rows))[1],
    )
    cache = StaticCache(config=model.config, max_cache_len=8)
    for layer in range(2):
        for _ in range(2):
            rows = append_latents(cache, torch.empty(2, 3, 64, device="meta"), layer)
            assert rows.shape == (2, 8, 64)
    assert counted == ["meta", "meta"]
    cpu = StaticCache(config=model.config, max_cache_len=8)
    append_latents(cpu, torch.ones(2, 3, 64), 0)
    append_latents(cpu, torch.ones(2, 3, 64), 0)
    assert int(cpu.layers[0].cumulative_length) == 6


def test_a_cache_without_room_for_index_keys_is_refused(model, ids):
    plain = DynamicCache(config=tiny_model(index_topk=None, index_share_pattern=None).config)
    with pytest.raises(ValueError, match="make the cache with the model's config"):
        model(ids, past_key_values=plain)


def test_a_cache_of_too_few_layers_is_refused(model, ids):
    short = DynamicCache(config=tiny_model(num_hidden_layers=2, index_share_pattern="FS").config)
    with pytest.raises(
        ValueError, match=r"layer 3 of this DynamicCache of 2 layers .* make the cache with the model's"
    ):
        full, token = tiny_model(index_share_pattern="FFFF").model, torch.zeros(1, 1, 48)
        full.layers[3].self_attn.indexer.append_keys(token, ForwardPlan.of(full, token, cache=short))


@pytest.mark.parametrize("grad", [False, True])
def test_a_dynamic_cache_made_without_a_config_makes_layers_with_room_for_index_keys(model, ids, grad):
    with torch.set_grad_enabled(grad):
        expected = model(ids).logits
        cache = DynamicCache()
        parts = [
            model(ids[:, first:last], past_key_values=cache).logits for first, last in ((0, 5), (5, 39), (39, 40))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)
    assert [layer.indexer_keys is not None for layer in cache.layers] == [letter == "F" for letter in PATTERN]
    assert torch.equal(
        model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=3, do_sample=False),
        model.generate(ids, max_new_tokens=3, do_sample=False),
    )
