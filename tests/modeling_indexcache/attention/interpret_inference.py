"""Run by test_inference_interpreted.py in a process of its own, with TRITON_INTERPRET=1.

A whole model on the fused kernels, which a CPU never runs otherwise: routing, experts, norms, RoPE in place and into
slices, linear layers and absorbed products of one token. The indexer and sparse attention stay PyTorch.
"""

import pytest
import torch
from testing.grouped_mm_loop import grouped_mm
from testing.tiny_models import GATES, tiny_model
from transformers import DynamicCache, StaticCache

from indexcache.kernels.experts import expert_topk, routed_experts
from indexcache.kernels.norm_rope_linear import index_keys, rms_norm, rotary
from indexcache.kernels.norm_rope_linear.absorbed_vector_triton import absorb_queries_triton, expand_values_triton
from indexcache.kernels.norm_rope_linear.vector_linear_triton import vector_linear_triton
from indexcache.kernels.sparse_mla.merged_selection import MergedSelection
from indexcache.modeling_indexcache import eligibility
from indexcache.modeling_indexcache.attention import inference_attention
from indexcache.modeling_indexcache.layers import few_token_linears, indexer

# bf16 products are wrong in Triton's interpreter (3.9); fp16 has the same code path.
DTYPE = torch.float16


def spied(calls, name, function):
    def call(*args, **kwargs):
        calls.add(name)
        return function(*args, **kwargs)

    return call


def first_spied(calls, name, backends):
    """An operation's backends, the first of which notes its runs."""
    first, *others = backends
    return (first._replace(run=spied(calls, name, first.run)), *others)


# Of experts, as DeepSeek-V3.2 has them.
GROUPS = dict(n_routed_experts=16, n_group=4, topk_group=2)


@pytest.fixture
def calls(monkeypatch):
    """Let every fused kernel take CPU tensors; the names of those that ran."""
    ran = set()
    for module, name, value in (
        (index_keys._ROWS, "backends", first_spied(ran, "index keys", index_keys._ROWS.backends)),
        (rms_norm._NORM, "backends", first_spied(ran, "norm", rms_norm._NORM.backends)),
        (rms_norm._ROWS, "backends", first_spied(ran, "latents", rms_norm._ROWS.backends)),
        (rotary._INTO, "backends", first_spied(ran, "rotate", rotary._INTO.backends)),
        (expert_topk._NORMED, "backends", first_spied(ran, "route normed", expert_topk._NORMED.backends)),
        (expert_topk._TOPK, "backends", first_spied(ran, "route", expert_topk._TOPK.backends)),
        (eligibility, "unsupported_experts_reason", lambda *t: None),
        (routed_experts, "_grouped_mm", lambda: grouped_mm),
        (routed_experts, "experts_vector", spied(ran, "experts of few", routed_experts.experts_vector)),
        (routed_experts, "combine", spied(ran, "experts of many", routed_experts.combine)),
        (few_token_linears, "takes_vector_linear", lambda x, *w: x.shape[0] <= 2),
        (few_token_linears, "vector_linear", spied(ran, "linears", vector_linear_triton)),
        (inference_attention, "takes_absorbed_vector", lambda q, *w: q.shape[:2].numel() <= 2),
        (inference_attention, "takes_sparse_mla", lambda *a: True),
        (inference_attention, "absorb_queries", spied(ran, "absorb", absorb_queries_triton)),
        (inference_attention, "expand_values", spied(ran, "values", expand_values_triton)),
    ):
        monkeypatch.setattr(module, name, value)
    return ran


def new_cache(model, kind):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=17 if kind == "static" else 9)


@pytest.mark.parametrize(
    ("kind", "interleaved", "switches"),
    [
        ("dynamic", True, {}),
        ("static", False, {}),
        ("static, no longer than the selection", True, {}),
        ("dynamic", False, GATES),
        ("dynamic", True, GROUPS),
    ],
)
def test_fused_inference_errs_as_pytorch_does(calls, kind, interleaved, switches):
    sizes = dict(index_share_pattern="FS", num_hidden_layers=2, n_group=1, indexer_rope_interleave=interleaved)
    model = tiny_model(**sizes | switches)
    tokens = 8 if kind.endswith("selection") else 16
    ids = torch.randint(2, 96, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = model(ids).logits
        model = model.to(DTYPE)
        plain = model(ids).logits
        assert not calls
        model.config._attn_implementation_internal = "triton"
        fused = model(ids).logits
        cache = new_cache(model, kind)
        model(ids[:, :5], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, tokens)]
    allowed = (plain - exact).abs().max()
    assert (fused - exact).abs().max() <= 2 * allowed
    assert (torch.cat(steps, dim=1) - exact[:, 5:]).abs().max() <= 2 * allowed
    expected = {
        "norm",
        "latents",
        "index keys",
        "rotate",
        "route",
        *([] if switches is GATES else ["route normed"]),  # a gated norm is not one with its router
        "experts of few",
        "experts of many",
        "linears",
        "absorb",
        "values",
    }
    assert calls == expected


def test_shared_layers_attend_by_lists_merged_ahead(calls, monkeypatch):
    model = tiny_model(index_share_pattern="FSSFF", num_hidden_layers=5, n_group=1)
    ids = torch.randint(2, 96, (2, 50), generator=torch.Generator().manual_seed(1))
    model.config._attn_implementation_internal = "triton"
    merged = []
    fill = MergedSelection.fill
    monkeypatch.setattr(MergedSelection, "fill", lambda self, *a: (merged.append(a[0]), fill(self, *a))[1])
    monkeypatch.setattr(indexer, "QUERY_BLOCK_BYTES", 2**13)
    monkeypatch.setattr(inference_attention, "SPARSE_BLOCK_BYTES", 2**13)
    with torch.no_grad():
        expected = model(ids).logits
        assert not merged
        monkeypatch.setattr(inference_attention, "merging_group", lambda *_: 3)
        got = model(ids).logits
        assert merged == 3 * [0, 24, 48]  # three full layers
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        listed = model(ids, output_topk_indices=True)
    assert len(listed.topk_indices) == 3 and listed.topk_indices[0].shape == (2, 50, 12)
    assert merged == 3 * [0, 24, 48]
