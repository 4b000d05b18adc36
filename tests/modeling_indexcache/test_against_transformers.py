"""Our logits equal those of transformers' own models, over random small shapes, patterns, paddings and caches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from testing.tiny_models import axk2_oracle, deepseek_oracle, glm_oracle, ours_like, own_name
from transformers import DynamicCache, StaticCache

from indexcache.kernels.lightning_indexer.lightning_indexer_reference import indexer_scores

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}


@st.composite
def shapes(draw):
    layers = draw(st.integers(1, 5))
    n_group = draw(st.sampled_from([1, 2, 4]))
    sizes = dict(
        hidden_size=draw(st.sampled_from([32, 48])),
        num_attention_heads=draw(st.sampled_from([1, 3, 4])),
        qk_nope_head_dim=draw(st.sampled_from([8, 16])),
        qk_rope_head_dim=draw(st.sampled_from([4, 8])),
        v_head_dim=draw(st.sampled_from([8, 12])),
        q_lora_rank=draw(st.sampled_from([16, 24])),
        kv_lora_rank=draw(st.sampled_from([8, 24])),
        n_group=n_group,
        topk_group=draw(st.integers(1, n_group)),
        first_k_dense_replace=draw(st.integers(0, 2)),
        attention_bias=draw(st.booleans()),
        norm_topk_prob=draw(st.booleans()),
        index_n_heads=draw(st.sampled_from([8, 12])),
        index_head_dim=draw(st.sampled_from([8, 16])),
        index_topk=draw(st.integers(1, 40)),
        rope_parameters=draw(st.sampled_from([YARN, {"rope_type": "default", "rope_theta": 10000.0}])),
    )
    sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return dict(
        sizes=sizes,
        pattern="F" + "".join(draw(st.lists(st.sampled_from("FS"), min_size=layers - 1, max_size=layers - 1))),
        family=draw(st.sampled_from(["glm", "deepseek", "axk2"])),
        backend=draw(st.sampled_from(["sdpa", "eager"])),
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 48)),
        padding=draw(st.sampled_from(["none", "left", "right"])),
        cache=draw(st.sampled_from(["none", "dynamic", "static"])),
        chunk=draw(st.integers(1, 48)),
        seed=draw(st.integers(0, 10**6)),
    )


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shapes())
def test_logits_equal_transformers(case):
    torch.manual_seed(case["seed"])
    make_oracle = {"glm": glm_oracle, "deepseek": deepseek_oracle, "axk2": axk2_oracle}[case["family"]]
    oracle = make_oracle(case["pattern"], **case["sizes"])
    model = ours_like(oracle, case["pattern"], case["backend"])
    ids = torch.randint(2, 97, (case["batch"], case["length"]))
    mask = _mask(case)
    with torch.no_grad():
        expected = oracle(ids, attention_mask=mask, use_cache=False).logits
        logits = _in_chunks(model, ids, mask, case)
    real = mask.bool()
    if not torch.allclose(logits[real], expected[real], atol=1e-4, rtol=1e-4):
        assume(not _selection_is_a_tie(model, ids, mask))
        torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make_oracle", [glm_oracle, axk2_oracle], ids=["glm", "axk2"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_fixed_shape_with_every_feature(backend, make_oracle):
    torch.manual_seed(1)
    oracle = make_oracle("FSSFS", attention_bias=True, rope_parameters=YARN, n_group=4, topk_group=2)
    model = ours_like(oracle, "FSSFS", backend)
    ids = torch.randint(2, 97, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, oracle(ids).logits, atol=1e-4, rtol=1e-4)


def test_gradients_equal_those_of_axk2():
    torch.manual_seed(2)
    oracle = axk2_oracle("FSFS").double().train()
    model = ours_like(oracle, "FSFS", "sdpa").double().train()
    ids = torch.randint(2, 97, (2, 24))
    for each in (oracle, model):
        each.set_experts_implementation("eager")  # the other ones have no fp64
        each(ids, labels=ids, use_cache=False).loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    wanted = {name: weight.grad for name, weight in oracle.named_parameters() if weight.grad is not None}
    wanted = {own_name(name): gradient for name, gradient in wanted.items()}
    assert found.keys() == wanted.keys() and any("W_down" in name for name in found)
    for name, gradient in found.items():
        # Norms of transformers' class are fp32 in any model.
        error = (gradient - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < 1e-5, name


@pytest.mark.parametrize("n_group", [None, 2])
def test_axk2_steps_equal_transformers(n_group):
    torch.manual_seed(3)
    oracle = axk2_oracle("FFSF", n_group=n_group, topk_group=n_group and 1)
    model, ids = ours_like(oracle, "FFSF", "sdpa"), torch.randint(2, 97, (2, 30))
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, wanted = (each.generate(ids, attention_mask=torch.ones_like(ids), **options) for each in (model, oracle))
    assert found.sequences.equal(wanted.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-4, rtol=1e-4)


def _mask(case):
    mask = torch.ones(case["batch"], case["length"], dtype=torch.long)
    if case["padding"] != "none":
        for row in range(case["batch"]):
            pad = (row * 5 + case["seed"]) % case["length"]
            if pad:
                span = slice(0, pad) if case["padding"] == "left" else slice(case["length"] - pad, None)
                mask[row, span] = 0
    return mask


def _in_chunks(model, ids, mask, case):
    if case["cache"] == "none":
        return model(ids, attention_mask=mask, use_cache=False).logits
    if case["cache"] == "static":
        cache = StaticCache(config=model.config, max_cache_len=case["length"] + 3)
    else:
        cache = DynamicCache(config=model.config)
    parts = []
    for first in range(0, case["length"], case["chunk"]):
        last = min(first + case["chunk"], case["length"])
        out = model(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def _selection_is_a_tie(model, ids, mask, tolerance=1e-5):
    """Whether some indexer's k-th and next best visible scores are equal within rounding."""
    seen = []

    def watch(module, args, kwargs, output):
        if output is None:
            return
        hidden, q_resid, plan = args
        length = hidden.shape[1]
        scores = indexer_scores(*module.project(hidden, q_resid, plan.angles), module.head_dim**-0.5)
        scores = scores.masked_fill(~plan.visibility.for_keys(length).rows(0, length, length), float("-inf"))
        best = scores.topk(min(module.index_topk + 1, length)).values
        if best.shape[-1] > module.index_topk:
            gap = best[..., -2] - best[..., -1]
            seen.append(bool((gap[best[..., -1] > float("-inf")] < tolerance).any()))

    hooks = [
        layer.self_attn.indexer.register_forward_hook(watch, with_kwargs=True)
        for layer in model.model.layers
        if layer.self_attn.indexer is not None
    ]
    model(ids, attention_mask=mask, use_cache=False)  # with gradient: streamed, an indexer is not called whole
    for hook in hooks:
        hook.remove()
    return any(seen)
