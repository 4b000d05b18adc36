"""What a forward returns on request."""

import pytest
import torch
from testing.tiny_models import tiny_model
from transformers import DynamicCache

from indexcache.kernels.lightning_indexer.indexer_quantization import e4m3_of_rows
from indexcache.modeling_indexcache.attention import query_chunks

PATTERN = "FSFS"


@pytest.fixture(scope="module")
def model():
    return tiny_model(index_share_pattern=PATTERN)


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(5)
    return torch.randint(2, 96, (2, 33))


def test_one_selection_a_full_layer_never_future_never_padded(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        selections = model(ids, attention_mask=mask, output_topk_indices=True).topk_indices
    assert len(selections) == PATTERN.count("F")
    for indices in selections:
        assert indices.shape == (2, 33, model.config.index_topk)
        assert indices.dtype == torch.int32
        for row in range(2):
            first = 6 if row == 0 else 0
            for query in range(first, 33):
                chosen = indices[row, query][indices[row, query] >= 0].tolist()
                assert chosen == sorted(set(chosen))
                assert len(chosen) == min(query - first + 1, model.config.index_topk)
                assert first <= chosen[0]
                assert chosen[-1] <= query


def test_indexer_fp8_selects_by_quantised_scores_and_is_off_by_default(model, ids, monkeypatch):
    assert not model.config.indexer_fp8
    plain = model(ids, output_topk_indices=True)
    monkeypatch.setattr(model.config, "indexer_fp8", True)
    rounded = model(ids, output_topk_indices=True)
    sets = [(set(a.tolist()), set(b.tolist())) for a, b in zip(plain.topk_indices[0][0], rounded.topk_indices[0][0])]
    assert plain.topk_indices[0].shape == rounded.topk_indices[0].shape
    assert any(a != b for a, b in sets)
    assert sum(len(a & b) for a, b in sets) > 0.8 * sum(len(a) for a, _ in sets)


def test_indexer_fp8_quantises_each_key_once_when_it_is_cached(model, ids, monkeypatch):
    monkeypatch.setattr(model.config, "indexer_fp8", True)
    with torch.no_grad():
        whole = model(ids, output_topk_indices=True).topk_indices[0]
        cache = DynamicCache(config=model.config)
        model(ids[:, :25], past_key_values=cache, use_cache=True)
        cached = cache.layers[0].indexer_keys.clone()
        for i in range(25, ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, output_topk_indices=True)
            assert torch.equal(out.topk_indices[0][:, 0], whole[:, i, : i + 1])
    assert torch.equal(cache.layers[0].indexer_keys[:, :25], cached)
    values, scale = e4m3_of_rows(cached)
    assert torch.equal(values.float() * scale.unsqueeze(-1), cached)


def test_selection_of_a_short_input_is_everything(model, ids):
    with torch.no_grad():
        selections = model(ids[:1, :3], output_topk_indices=True).topk_indices
    assert selections[0].tolist() == [[[0, -1, -1], [0, 1, -1], [0, 1, 2]]]


def test_hidden_states_router_logits_and_logits_to_keep(model, ids):
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_router_logits=True, logits_to_keep=2)
        full = model(ids).logits
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert len(out.router_logits) == model.config.mlp_layer_types.count("sparse")
    torch.testing.assert_close(out.logits, full[:, -2:])


def test_eager_returns_weights_that_are_zero_where_not_selected(model, ids):
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(ids, output_attentions=True, output_topk_indices=True)
    finally:
        model.set_attn_implementation("sdpa")
    assert len(out.attentions) == 4
    for layer, weights in enumerate(out.attentions):
        indices = out.topk_indices[layer // 2]
        assert weights.shape == (2, 4, 33, 33)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 33))
        allowed = torch.zeros(2, 33, 34, dtype=torch.bool)
        allowed.scatter_(-1, indices.long().masked_fill(indices < 0, 33), True)
        assert (weights.transpose(1, 2)[~allowed[..., :33].unsqueeze(2).expand(-1, -1, 4, -1)] == 0).all()


@pytest.mark.parametrize("first", [0, 5, 31], ids=["prefill", "chunk", "few queries"])
def test_eager_weights_and_hidden_states_are_on_the_way_to_the_loss(ids, monkeypatch, first):
    monkeypatch.setattr(query_chunks, "ATTENTION_BLOCK_BYTES", 2**10)
    model = tiny_model(index_share_pattern=PATTERN)
    model.set_attn_implementation("eager")
    prefix = model(ids[:, :first], use_cache=True).past_key_values if first else None
    out = model(ids[:, first:], past_key_values=prefix, output_attentions=True, output_hidden_states=True)
    kept = [*out.attentions, *out.hidden_states]
    for tensor in kept:
        tensor.retain_grad()
    out.logits.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)


@pytest.mark.parametrize("asked", ["argument", "config"])
@pytest.mark.parametrize("grad", [False, True])
def test_router_logits_are_recorded_as_in_glm(ids, grad, asked):
    from testing.tiny_models import glm_oracle, ours_like

    theirs = glm_oracle(PATTERN)
    ours = ours_like(theirs, PATTERN, "sdpa")
    for part in (lambda model: model, lambda model: model.model):
        found = []
        for model in (theirs, ours):
            with torch.set_grad_enabled(grad):
                if asked == "config":
                    model.config.output_router_logits = True
                    found.append(part(model)(ids).router_logits)
                    model.config.output_router_logits = False
                else:
                    found.append(part(model)(ids, output_router_logits=True).router_logits)
        assert len(found[0]) == 3
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_an_empty_prompt_embedding_or_both_inputs_is_refused(model, ids):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.model(ids, inputs_embeds=torch.zeros(2, 33, 48))


def test_inputs_embeds_equal_input_ids(model, ids):
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        torch.testing.assert_close(embedded, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_prepared_four_dimensional_mask_means_the_same_as_its_two_dimensions(model, ids, dtype):
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :9] = False
    prepared = (torch.ones(33, 33, dtype=torch.bool).tril() & mask[:, None, :]).unsqueeze(1)
    if dtype != torch.bool:
        prepared = torch.zeros(prepared.shape).masked_fill(~prepared, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask]
        torch.testing.assert_close(model(ids, attention_mask=prepared).logits[mask], expected)


def test_another_pattern_at_run_time_equals_loading_with_it(ids):
    full = tiny_model(index_share_pattern="FFFF")
    loaded = tiny_model(index_share_pattern="FFSS")
    loaded.load_state_dict(full.state_dict(), strict=False)
    full.set_index_share_pattern("FFSS")
    with torch.no_grad():
        torch.testing.assert_close(full(ids).logits, loaded(ids).logits)
    with pytest.raises(ValueError, match=r"makes layers \[2\] full, but they have no indexer"):
        loaded.set_index_share_pattern("FFFS")


def test_dense_model_without_indexers_equals_glm4_moe_lite(ids):
    from testing.tiny_models import SIZES
    from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

    sizes = {k: v for k, v in SIZES.items() if not k.startswith("index_")}
    config = Glm4MoeLiteConfig(**sizes, mlp_layer_types=["dense"] + ["sparse"] * 3, rms_norm_eps=1e-6)
    theirs = Glm4MoeLiteForCausalLM._from_config(config)
    ours = tiny_model(index_topk=None, routed_scaling_factor=theirs.config.routed_scaling_factor)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
