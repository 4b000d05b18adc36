"""Without gradient a forward streams in blocks and adds in place; numbers, hooks and caches stay what they were."""

import copy

import pytest
import torch
from testing.tiny_models import GATES, tiny_model
from torch.nn.modules.module import register_module_forward_hook
from transformers import DynamicCache

from indexcache.kernels.experts import routed_experts
from indexcache.kernels.sparse_mla.merged_selection import MergedSelection
from indexcache.modeling_indexcache.attention import inference_attention, query_chunks
from indexcache.modeling_indexcache.attention.absorbed_attention import attend_absorbed
from indexcache.modeling_indexcache.cache import growing_cache
from indexcache.modeling_indexcache.eligibility import is_plain_linear, is_plain_norm, why_not_in_place
from indexcache.modeling_indexcache.forward_plan import ForwardPlan
from indexcache.modeling_indexcache.layers import feed_forward, indexer
from indexcache.modeling_indexcache.selection import Selection

PATTERN = "FSFS"


@pytest.fixture(
    scope="module", params=[{}, {"q_lora_rank": None, "index_topk": None}, GATES], ids=["sparse", "dense", "gates"]
)
def any_model(request):
    pattern = None if "index_topk" in request.param else PATTERN
    return tiny_model(index_share_pattern=pattern, **request.param)


@pytest.fixture(scope="module")
def model():
    return tiny_model(index_share_pattern=PATTERN)


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(4)
    return torch.randint(2, 96, (3, 40))


@pytest.mark.parametrize("mask_kind", ["none", "padding", "each query's own"])
def test_blocks_of_a_few_tokens_equal_one_forward_with_gradient(any_model, ids, monkeypatch, mask_kind):
    monkeypatch.setattr(query_chunks, "ATTENTION_BLOCK_BYTES", 2**15)
    monkeypatch.setattr(indexer, "QUERY_BLOCK_BYTES", 2**14)
    monkeypatch.setattr(indexer, "WIDENED_TOKENS", 3)
    monkeypatch.setattr(feed_forward, "FEED_FORWARD_BLOCK_BYTES", 2**12)
    monkeypatch.setattr(routed_experts, "BLOCK_BYTES", 2**13)
    mask, seen = None, torch.ones_like(ids, dtype=torch.bool)
    if mask_kind != "none":
        seen[1, :9] = False
        mask = seen
    if mask_kind == "each query's own":
        mask = (torch.ones(40, 40, dtype=torch.bool).tril() & seen[:, None, :]).unsqueeze(1)
    expected = any_model(ids, attention_mask=mask).logits
    with torch.no_grad():
        got = any_model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[seen], expected[seen], atol=1e-5, rtol=1e-5)


def test_hidden_states_and_hooks_see_what_they_saw(model, ids):
    seen = []
    layer = model.model.layers[2]
    handles = [m.register_forward_hook(lambda *a: seen.append(a[2])) for m in (layer.mlp, layer.self_attn)]
    try:
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    plain = model(ids, output_hidden_states=True)
    for got, expected in zip(out.hidden_states, plain.hidden_states):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert seen[1].shape == (3, 40, 48)  # whole, where somebody looks
    attended, fed = seen[0][0], seen[1]
    torch.testing.assert_close(out.hidden_states[2] + attended + fed, out.hidden_states[3], atol=1e-5, rtol=1e-5)


def seen_by(register, part, model, ids):
    """Outputs of `part` that a forward hook sees in one forward, hooked by itself or on every module."""
    seen = []

    def look(module, args, out):
        if module is part:
            seen.append(out[0].clone() if isinstance(out, tuple) else out.clone())

    handle = register(look)
    try:
        model(ids)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("everywhere", [False, True], ids=["own hook", "global hook"])
@pytest.mark.parametrize("path", ["self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "mlp.shared_experts"])
def test_a_watched_part_makes_what_it_makes_with_gradient(model, ids, monkeypatch, path, everywhere):
    monkeypatch.setattr(query_chunks, "ATTENTION_BLOCK_BYTES", 2**15)
    part = model.model.layers[3].get_submodule(path)
    register = register_module_forward_hook if everywhere else part.register_forward_hook
    (expected,) = seen_by(register, part, model, ids)
    with torch.no_grad():
        seen = seen_by(register, part, model, ids)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


def test_global_hooks_keep_linear_layers_and_norms_out_of_kernels(model):
    attention = model.model.layers[1].self_attn
    plain = (is_plain_linear, attention.o_proj), (is_plain_norm, attention.q_a_layernorm)
    assert all(ask(module) for ask, module in plain)
    handle = register_module_forward_hook(lambda *a: None)
    try:
        assert not any(ask(module) for ask, module in plain)
    finally:
        handle.remove()


def test_a_merged_selection_is_refused_where_gradients_flow(model, ids):
    attention = model.model.layers[1].self_attn
    q = torch.zeros(3, 40, attention.config.num_attention_heads, attention.nope_dim)
    merged = MergedSelection.empty(3, 40, 8, 2, ids.device)
    plan = ForwardPlan.of(model.model, torch.zeros(3, 40, 48))
    with pytest.raises(TypeError, match=r"not MergedSelection: .* a plan without merge_selections"):
        attend_absorbed(attention, (q, q[..., : attention.rope_dim]), torch.zeros(3, 40, 1), Selection(merged), plan)


def test_given_embeddings_and_recorded_hidden_states_are_not_overwritten(model, ids):
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        given = embedded.clone()
        expected = model(ids).logits
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(embedded, given)
        recorded = model(ids, output_hidden_states=True).hidden_states[2]
        kept = recorded.clone()
        model(ids)
        assert torch.equal(recorded, kept)
        seen = []
        handle = model.model.layers[1].register_forward_hook(lambda *a: seen.append((a[2][0], a[2][0].clone())))
        try:
            assert why_not_in_place(model.model.layers[1], embedded.device) == "a hook watches it"
            model(ids)
        finally:
            handle.remove()
    assert torch.equal(*seen[0])


def test_recorders_that_transformers_leaves_behind_change_nothing_when_idle(ids, monkeypatch):
    model, overwritten = tiny_model(index_share_pattern=PATTERN), []
    attend = inference_attention._attend_to_selected

    def spied(module, queries, latents, selection, plan):
        overwritten.append(plan.overwrites(module.layer_idx))
        return attend(module, queries, latents, selection, plan)

    monkeypatch.setattr(inference_attention, "_attend_to_selected", spied)
    with torch.no_grad():
        model(ids)
        model(ids, output_hidden_states=True, output_topk_indices=True)
        assert model.model.layers[1]._forward_hooks and model.model.layers[0].self_attn.indexer._forward_hooks
        model(ids)
    in_place = [False, True, True, True]
    assert overwritten == [*in_place, *4 * [False], *in_place]


def decoded(model, ids, cache, first):
    with torch.no_grad():
        return [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(first, ids.shape[1])]


def test_decoding_appends_in_place_and_frees_nothing_handed_out(model, ids, monkeypatch):
    monkeypatch.setattr(growing_cache, "LEAST_ROOM", 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :20], past_key_values=cache)
        kept = cache.layers[0].keys
        snapshot = kept.clone()
        addresses = set()
        for i in range(20, 40):
            got = model(ids[:, i : i + 1], past_key_values=cache).logits
            torch.testing.assert_close(got[:, 0], expected[:, i], atol=1e-5, rtol=1e-5)
            addresses.add(cache.layers[0].keys.data_ptr())
    assert len(addresses) == 3  # three buffers with room for 8 rows each
    assert torch.equal(kept, snapshot)
    assert cache.layers[1].indexer_keys is None


def test_cropped_copied_and_reordered_caches_go_their_own_ways(model, ids):
    with torch.no_grad():
        expected = model(ids).logits
        cache = DynamicCache(config=model.config)
        model(ids[:, :30], past_key_values=cache)
        decoded(model, ids[:, :33], cache, 30)
        handed_out = [layer.keys for layer in cache.layers]
        before = [keys.clone() for keys in handed_out]
        # A shallow copy shares tensors and buffers; a deep one its own.
        twin = copy.copy(cache)
        twin.layers = [copy.copy(layer) for layer in cache.layers]
        deep = copy.deepcopy(cache)
        other = ids.flip(1)
        decoded(model, other, twin, 35)
        decoded(model, other, deep, 35)
        cache.crop(-3)
        decoded(model, other[:, :37], cache, 34)
        cache.crop(-3)
        for i, got in enumerate(decoded(model, ids, cache, 30)):
            torch.testing.assert_close(got[:, 0], expected[:, 30 + i], atol=1e-5, rtol=1e-5)
        assert all(torch.equal(now, then) for now, then in zip(handed_out, before))


def test_a_cache_filled_in_inference_mode_goes_on_outside(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=cache)
        decoded_inside = model(ids[:, 30:31], past_key_values=cache).logits.clone()
    with torch.no_grad():
        expected = model(ids).logits
        got = decoded(model, ids, cache, 31)
    torch.testing.assert_close(decoded_inside[:, 0], expected[:, 30], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[-1][:, 0], expected[:, -1], atol=1e-5, rtol=1e-5)
