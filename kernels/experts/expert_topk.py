"""Routing of DeepSeek's mixture of experts: logits, sigmoid, balancing bias, top-k and weights.

Source: DeepSeek-V3 report, section 2.1.2. Groups: only experts of the `topk_group` groups whose two best sum highest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..common.argument_checks import check_floats, check_integer, check_shape, check_tensors
from ..common.custom_op import custom_op
from ..common.dispatch import Backend, Operation, takes_all
from ..common.triton_support import HALF_PRECISION, has_kernels, needs_gradient
from ..norm_rope_linear.rms_norm import rms_norm
from .expert_topk_triton import MAX_EXPERTS, VECTOR_TOKENS, expert_topk_triton, normed_expert_topk_triton

# Groups are axes of a tile, whose other experts would be none.
LEAST_GROUPED = 16
_NO_GROUPS = (None, 1, float("-inf"))


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
    groups = _checked_groups("expert_topk", weight.shape[0], groups, topk_groups)
    arguments = (x, weight, bias, k, scaling, normalise, groups, topk_groups, masked_score)
    if allow_triton and _TOPK.chooses_kernels(x.device, *arguments):
        return _expert_topk(*arguments)
    return expert_topk_reference(*arguments)


def takes_normed_expert_topk(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    groups: int | None = None,
    topk_groups: int = 1,
) -> bool:
    """Whether `normed_expert_topk` runs these, `x [tokens, D]` of few tokens and a norm's weight `[D]`."""
    return (
        x.shape[0] <= VECTOR_TOKENS
        and norm.dtype == x.dtype
        and has_kernels(x.device)
        and _why_not_triton(x, weight, bias, k, 1.0, True, None if groups == 1 else groups, topk_groups) is None
    )


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
    groups: int | None = None,
    topk_groups: int = 1,
    masked_score: float = float("-inf"),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm and then `expert_topk` in a launch or two, for a few tokens on a GPU.

    Args:
        x: `[tokens, D]`, before the norm.
        norm: `[D]`, its weight.
        eps: of the norm.
        weight: `[E, D]`.
        bias: `[E]`.
        k: experts a token.
        scaling: as `expert_topk`.
        normalise: as `expert_topk`.
        groups: as `expert_topk`.
        topk_groups: as `expert_topk`.
        masked_score: as `expert_topk`.

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
    groups = _checked_groups("normed_expert_topk", weight.shape[0], groups, topk_groups)
    grouping = (groups, topk_groups, masked_score)
    return _NORMED(x.device, x, norm, eps, weight, bias, k, scaling, normalise, *grouping)


def _normed_in_pytorch(x, norm, eps, weight, bias, k, scaling, normalise, *grouping):
    normed = rms_norm(x, norm, eps, allow_triton=False)
    return normed, *expert_topk_reference(normed, weight, bias, k, scaling, normalise, *grouping)[1:]


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


def _checked_groups(operation: str, experts: int, groups: int | None, topk_groups: int) -> int | None:
    """The number of groups, or None where there is one."""
    if groups is None or groups <= 1:
        return None
    check_integer(operation, "groups", groups, 1, experts)
    check_integer(operation, "topk_groups", topk_groups, 1, groups)
    if experts % groups:
        raise ValueError(f"{operation}: {experts} experts do not divide into {groups} groups")
    return groups


def _why_not_triton(
    x, weight, bias, k, scaling, normalise, groups=None, topk_groups=1, masked_score=None
) -> str | None:
    if x.dtype not in HALF_PRECISION or weight.dtype != x.dtype:
        return "it takes bfloat16 or float16 tokens and weights of one dtype"
    if weight.device != x.device or bias.device != x.device:
        return "weights and tokens are on different devices"
    if needs_gradient(x, weight):
        return "it has no gradient"
    experts = weight.shape[0]
    if experts > MAX_EXPERTS:
        return f"it takes at most {MAX_EXPERTS} experts"
    if groups is not None:
        if experts < LEAST_GROUPED or experts & (experts - 1) or groups & (groups - 1):
            return f"it takes groups by powers of two and {LEAST_GROUPED} experts or more, not {experts} in {groups}"
        if k > topk_groups * (experts // groups):
            return f"the groups chosen from have fewer than {k} experts"
    return None


def _why_not_normed(x, norm, eps, weight, bias, *rest) -> str | None:
    if x.shape[0] > VECTOR_TOKENS:
        return f"it is for at most {VECTOR_TOKENS} tokens"
    return _why_not_triton(x, weight, bias, *rest)


_NORMED = Operation(
    "normed_expert_topk",
    Backend("Triton", _why_not_normed, normed_expert_topk_triton),
    Backend("PyTorch", takes_all, _normed_in_pytorch),
    token=lambda new: (new(1, 2048), new(2048), 1e-6, new(64, 2048), new(64), 4, 1.0, True, *_NO_GROUPS),
)

_TOPK = Operation(
    "expert_topk",
    Backend("Triton", _why_not_triton, expert_topk_triton, optional=True),
    Backend("PyTorch", takes_all, expert_topk_reference),
    prefill=lambda new: (new(8192, 2048), new(64, 2048), new(64), 4, 1.0, True, *_NO_GROUPS),
    token=lambda new: (new(1, 2048), new(64, 2048), new(64), 4, 1.0, True, *_NO_GROUPS),
)


def _shapes(x, weight, bias, k, *_):
    shapes = ((weight.shape[0], torch.float32), (k, torch.float32), (k, torch.int64))
    return tuple(x.new_empty(x.shape[0], width, dtype=dtype) for width, dtype in shapes)


@custom_op(_shapes)
def _expert_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    scaling: float,
    normalise: bool,
    groups: int | None,
    topk_groups: int,
    masked_score: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _TOPK(x.device, x, weight, bias, k, scaling, normalise, groups, topk_groups, masked_score)
