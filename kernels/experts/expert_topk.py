"""Routing of DeepSeek's mixture of experts: logits, sigmoid, balancing bias, top-k and weights.

Source: DeepSeek-V3 report, section 2.1.2. Groups: only experts of the `topk_group` groups whose two best sum highest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..common.argument_checks import check_floats, check_integer, check_shape, check_tensors
from ..common.dispatch import Backend, dispatch, takes_all
from ..common.kernel_launch import register_fake
from ..common.triton_support import runs_kernels
from ..norm_rope_linear.rms_norm import rms_norm
from .expert_topk_triton import MAX_EXPERTS, expert_topk_triton, is_vector, normed_expert_topk_triton, triton

# A namespace of its own for every copy of this file: the installed one and each revision loaded from the Hub.
_NAMESPACE = __name__.replace(".", "_")


def expert_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    *,
    scaling: float = 1.0,
    normalise: bool = True,
    groups: int | None = None,
    topk_groups: int = 1,
    masked_score: float = float("-inf"),
    allow_triton: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose `k` experts for every token.

    Args:
        x: `[tokens, D]`.
        weight: `[E, D]`.
        bias: `[E]`, added to the sigmoid scores for the choice alone.
        k: experts a token.
        scaling: factor on the weights.
        normalise: let the weights of a token sum to `scaling`.
        groups: number of groups of experts; None or 1: no groups.
        topk_groups: groups a token may choose from.
        masked_score: what stands in the choice for experts of other groups.
        allow_triton: use the Triton kernel on CUDA where it takes these arguments; False is PyTorch anywhere.

    Returns:
        fp32 logits `[tokens, E]`, weights `[tokens, k]` and int64 experts `[tokens, k]`, in no particular order.

    Raises:
        TypeError: a tensor or integer that is none.
        ValueError: shapes, dtypes or devices that do not fit each other, more experts than there are.
    """
    _check_routing("expert_topk", x, weight, bias, k)
    grouped = groups is not None and groups > 1
    if groups is not None and groups > 1:
        check_integer("expert_topk", "groups", groups, 1, weight.shape[0])
        check_integer("expert_topk", "topk_groups", topk_groups, 1, groups)
        if weight.shape[0] % groups:
            raise ValueError(f"expert_topk: {weight.shape[0]} experts do not divide into {groups} groups")
    if allow_triton and not grouped and _fits(x, weight, bias):
        return _expert_topk(x, weight, bias, k, scaling, normalise)
    return expert_topk_reference(
        x, weight, bias, k, scaling, normalise, groups if grouped else None, topk_groups, masked_score
    )


def takes_normed_expert_topk(x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether `normed_expert_topk` runs these, `x [tokens, D]` of few tokens and a norm's weight `[D]`."""
    return is_vector(x.shape[0], weight.shape[0]) and norm.dtype == x.dtype and _fits(x, weight, bias)


def normed_expert_topk(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    *,
    scaling: float = 1.0,
    normalise: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm and then `expert_topk` in one launch, for a few tokens on a GPU.

    Args:
        x: `[tokens, D]`, before the norm.
        norm: `[D]`, its weight.
        eps: of the norm.
        weight: `[E, D]`.
        bias: `[E]`.
        k: experts a token.
        scaling: as `expert_topk`.
        normalise: as `expert_topk`.

    Returns:
        The normed rows `[tokens, D]`, fp32 weights and int64 experts, `[tokens, k]` each.

    Raises:
        TypeError: a tensor or integer that is none.
        ValueError: shapes, dtypes or devices that do not fit each other, more experts than there are.
    """
    _check_routing("normed_expert_topk", x, weight, bias, k)
    check_tensors("normed_expert_topk", x=x, norm=norm)
    check_floats("normed_expert_topk", norm=norm)
    check_shape("normed_expert_topk", "norm", norm, "[D]", x.shape[1:])
    backends = _NORMED if runs_kernels(x) else _NORMED[-1:]
    arguments = (x, norm, eps, weight, bias, k, scaling, normalise)
    return dispatch("normed_expert_topk", backends, x.device, *arguments)


def _normed_in_pytorch(x, norm, eps, weight, bias, k, scaling, normalise):
    normed = rms_norm(x, norm, eps, allow_triton=False)
    return normed, *expert_topk_reference(normed, weight, bias, k, scaling, normalise)[1:]


_NORMED = (
    Backend("Triton", takes_all, normed_expert_topk_triton),
    Backend("PyTorch", takes_all, _normed_in_pytorch),
)


def expert_topk_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    scaling: float,
    normalise: bool,
    groups: int | None = None,
    topk_groups: int = 1,
    masked_score: float = float("-inf"),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and results as `expert_topk`, in PyTorch."""
    logits = F.linear(x.float(), weight.float())
    scores = logits.sigmoid()
    choice = scores + bias
    if groups is not None:
        by_group = choice.view(choice.shape[0], groups, choice.shape[1] // groups)
        group_scores = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
        best = group_scores.topk(topk_groups, dim=-1, sorted=False).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        choice = by_group.masked_fill(outside.unsqueeze(-1), masked_score).flatten(1)
    experts = choice.topk(k, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return logits, weights * scaling, experts


def _check_routing(operation: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int) -> None:
    check_tensors(operation, x=x, weight=weight, bias=bias)
    check_floats(operation, x=x, weight=weight, bias=bias)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"{operation}: x [tokens, D] and weight [E, D] do not fit: got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    check_shape(operation, "bias", bias, "[E]", weight.shape[:1])
    check_integer(operation, "k", k, 1, weight.shape[0])


def _fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (
        triton is not None
        and x.is_cuda
        and not needs_grad
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and weight.is_cuda
        and bias.is_cuda
        and weight.shape[0] <= MAX_EXPERTS
    )


@torch.library.custom_op(f"{_NAMESPACE}::expert_topk", mutates_args=())
def _expert_topk(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, scaling: float, normalise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backends = _BACKENDS if x.is_cuda else _BACKENDS[-1:]
    return dispatch("expert_topk", backends, x.device, x, weight, bias, k, scaling, normalise)


_BACKENDS = (
    Backend("Triton", takes_all, expert_topk_triton),
    Backend("PyTorch", takes_all, expert_topk_reference),
)


@register_fake(_expert_topk)
def _(x, weight, bias, k, scaling, normalise):
    tokens = x.shape[0]
    return (
        x.new_empty(tokens, weight.shape[0], dtype=torch.float32),
        x.new_empty(tokens, k, dtype=torch.float32),
        x.new_empty(tokens, k, dtype=torch.int64),
    )
