"""Routing within groups of experts in Triton's interpreter, and on a GPU: as in transformers, the first of equals."""

import sys

import pytest
import torch

pytest.importorskip("triton")

from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32TopkRouter

from indexcache.kernels.common.dispatch import no_fallback
from indexcache.kernels.experts.expert_topk import (
    expert_topk,
    expert_topk_reference,
    normed_expert_topk,
    takes_normed_expert_topk,
)
from indexcache.kernels.norm_rope_linear.rms_norm import rms_norm

DTYPE = torch.float16
ON_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture(
    autouse=True,
    params=[pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=ON_A_GPU)],
)
def _device(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DTYPE", torch.float16 if request.param == "cpu" else torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(request.param), no_fallback():
        yield


def exact_inputs(tokens, experts, width):
    """Rows and weights whose products are exact in any order, with many experts alike."""
    x = torch.randint(-2, 3, (tokens, width)).to(DTYPE)
    weight = (torch.randint(-2, 3, (experts, width)) / 16).to(DTYPE)
    weight[experts // 2 :] = weight[: experts // 2]
    return x, weight, torch.randint(-2, 3, (experts,)) / 8


def first_of_equals(x, weight, bias, k, groups, kept, masked):
    """Experts by stable sorting."""
    logits = x.float() @ weight.float().T
    choice = logits.sigmoid() + bias
    by_group = choice.view(len(x), groups, -1)
    sums = by_group.sort(-1, descending=True).values[..., : min(2, by_group.shape[-1])].sum(-1)
    best = sums.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    outside = torch.ones_like(sums, dtype=torch.bool).scatter_(1, best, False)
    choice = by_group.masked_fill(outside[..., None], masked).flatten(1)
    return logits, choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]


# DeepSeek-V3.2's numbers, few of both, a group an expert, and all groups kept; of few experts and many, few tokens and
# more.
SHAPES = [(256, 8, 4, 8), (32, 4, 2, 3), (16, 16, 5, 4), (64, 2, 2, 6), (128, 4, 1, 8)]


@pytest.mark.parametrize("masked", [float("-inf"), 0.0])
@pytest.mark.parametrize("tokens", [1, 4, 21])
@pytest.mark.parametrize(("experts", "groups", "kept", "k"), SHAPES)
def test_the_first_of_equal_experts_and_groups(tokens, experts, groups, kept, k, masked):
    x, weight, bias = exact_inputs(tokens, experts, 96)
    options = dict(groups=groups, topk_groups=kept, masked_score=masked)
    logits, weights, chosen = expert_topk(x, weight, bias, k, scaling=2.5, **options)
    expected_logits, expected = first_of_equals(x, weight, bias, k, groups, kept, masked)
    assert torch.equal(logits, expected_logits)
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)
    scores = logits.sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights, 2.5 * scores / scores.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize(("experts", "groups", "kept", "k"), SHAPES[:2])
def test_as_the_class_of_transformers(tokens, experts, groups, kept, k):
    sizes = dict(num_experts_per_tok=k, n_routed_experts=experts, num_local_experts=experts, hidden_size=80)
    config = DeepseekV32Config(**sizes, n_group=groups, topk_group=kept, routed_scaling_factor=2.5)
    router = DeepseekV32TopkRouter(config)
    x, weight, bias = exact_inputs(tokens, experts, 80)
    if x.device.type == "cpu":
        # A CPU's topk takes any of equal experts: here none are.
        bias = torch.randn(experts)
    router.weight.data, router.e_score_correction_bias = weight, bias
    expected_logits, expected_weights, expected = router(x)
    logits, weights, chosen = expert_topk(x, weight, bias, k, scaling=2.5, groups=groups, topk_groups=kept)
    assert torch.equal(logits, expected_logits)
    (chosen, order), (expected, expected_order) = chosen.sort(-1), expected.sort(-1)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order))


@pytest.mark.parametrize(("experts", "groups"), [(256, 8), (32, None), (160, None), (64, 4)])
def test_behind_a_norm_it_is_a_norm_and_then_routing(experts, groups):
    x, norm = 3 * torch.randn(3, 1100 + 8, dtype=DTYPE)[:, 3:1103], torch.randn(1100, dtype=DTYPE)
    weight, bias = torch.randn(experts, 1100, dtype=DTYPE) / 33, torch.randn(experts) * 0.1
    options = dict(scaling=1.8, groups=groups, topk_groups=2)
    assert takes_normed_expert_topk(x, norm, weight, bias, 4, groups, 2)
    with no_fallback() as ran:
        got, weights, chosen = normed_expert_topk(x, norm, 1e-6, weight, bias, 4, **options)
    assert ran == [("normed_expert_topk", "Triton")]
    torch.testing.assert_close(got, rms_norm(x, norm, 1e-6, allow_triton=False), rtol=1e-2, atol=1e-3)
    _, expected, expected_chosen = expert_topk(got, weight, bias, 4, **options)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(chosen, expected_chosen)


def test_nan_is_survived():
    x, weight, bias = exact_inputs(3, 64, 96)
    x[1] = float("nan")
    chosen = expert_topk(x, weight, bias, 6, groups=4, topk_groups=2)[2]
    assert len(set(chosen[1].tolist())) == 6 and 0 <= chosen.min() <= chosen.max() < 64


def test_other_groups_are_routed_in_pytorch():
    x, weight, bias = exact_inputs(5, 48, 96)
    options = dict(scaling=1.0, normalise=True, groups=6, topk_groups=3)
    with no_fallback() as ran:
        got = expert_topk(x, weight, bias, 4, **options)
    assert ran == []
    expected = expert_topk_reference(x, weight, bias, 4, *options.values())
    assert all(torch.equal(one, other) for one, other in zip(got, expected))
