"""Gated experts of a mixture, routed and shared, for tokens that know their experts.

Few tokens read the chosen experts' weights once, in two matrix-vector kernels; many go through grouped matmuls in
blocks whose temporaries are bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..common.argument_checks import check_experts, check_floats, check_shape, check_tensors
from ..common.custom_op import custom_op
from ..common.device_target import why_too_old
from ..common.dispatch import Backend, Operation, takes_all
from ..common.triton_support import NO_TRITON, has_kernels, needs_gradient
from .expert_groups_triton import group_by_expert_triton
from .routed_experts_triton import combine, copy_rows, experts_vector, gated

# Up to so many tokens the matrix-vector kernels are faster than sorting and grouping.
VECTOR_TOKENS = 6
# With more experts PyTorch sorts.
MAX_COUNTED = 512
# Temporaries of a block of tokens in the grouped matmuls, in bytes: large ones, every matmul has a tail per expert.
BLOCK_BYTES = 640 * 2**20

Shared = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def routed_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    shared: Shared | None = None,
    accumulate: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sum_j weights[t, j] * expert_j(x[t]) + shared(x[t])`, where `expert(x) = down (silu(gate x) * up x)`.

    Args:
        x: `[T, D]`.
        experts: int64 `[T, K]`, in 0 .. E - 1. On a CPU others are refused; a GPU does not look, and reads what is not
            a weight.
        weights: fp32 `[T, K]`.
        gate_up: `[E, 2 I, D]`, gate above up.
        down: `[E, D, I]`.
        shared: `gate [J, D]`, `up [J, D]`, `down [D, J]` of an expert that every token takes, or None.
        accumulate: contiguous `[T, D]` to add the result to, in place; not inside `torch.compile`.

    Returns:
        `[T, D]`: `accumulate` if given. No gradient flows.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
        IndexError: an expert that there is not, on a CPU.
    """
    _check_arguments(x, experts, weights, gate_up, down, shared, accumulate)
    gate, up, shared_down = shared if shared is not None else (None, None, None)
    if accumulate is None:
        return _routed_experts(x, experts, weights, gate_up, down, gate, up, shared_down)
    return _EXPERTS(x.device, x, experts, weights, gate_up, down, shared, accumulate)


def _check_arguments(
    x: Any, experts: Any, weights: Any, gate_up: Any, down: Any, shared: Any, accumulate: Any
) -> None:
    name = "routed_experts"
    if shared is not None and len(shared) != 3:
        raise ValueError(f"{name}: shared must be the three weights gate, up and down, got {len(shared)}")
    gate, up, shared_down = shared if shared is not None else (None, None, None)
    floats = {"gate_up": gate_up, "down": down, "gate": gate, "up": up, "shared down": shared_down}
    check_tensors(name, x=x, experts=experts, weights=weights, accumulate=accumulate, **floats)
    check_floats(name, x=x, weights=weights, accumulate=accumulate, **floats)
    if x.dim() != 2 or experts.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3:
        raise ValueError(
            f"{name}: x [T, D], experts [T, K], gate_up [E, 2 I, D] and down [E, D, I] do not fit: got "
            f"{tuple(x.shape)}, {tuple(experts.shape)}, {tuple(gate_up.shape)} and {tuple(down.shape)}"
        )
    (tokens, width), (count, _, inner) = x.shape, down.shape
    check_shape(name, "down", down, "[E, D, I]", (count, width, inner))
    check_shape(name, "gate_up", gate_up, "[E, 2 I, D]", (count, 2 * inner, width))
    check_shape(name, "experts", experts, "[T, K]", (tokens, experts.shape[1]), torch.int64)
    check_shape(name, "weights", weights, "[T, K]", experts.shape)
    if gate is not None:
        rows = gate.shape[0] if gate.dim() else 0
        check_shape(name, "gate", gate, "[J, D]", (rows, width))
        check_shape(name, "up", up, "[J, D]", (rows, width))
        check_shape(name, "shared down", shared_down, "[D, J]", (width, rows))
    if accumulate is not None:
        check_shape(name, "accumulate", accumulate, "[T, D]", x.shape)
        if accumulate.dtype != x.dtype or not accumulate.is_contiguous():
            raise ValueError(f"{name}: accumulate must be contiguous {x.dtype}, as x, got {accumulate.dtype}")
    for key, value in floats.items():
        if value is not None and value.dtype != x.dtype:
            raise ValueError(f"{name}: {key} must be {x.dtype}, as x, got {value.dtype}")
    check_experts(name, experts, count)


def unsupported_experts_reason(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> str | None:
    """Why `routed_experts` does not run these tensors in kernels, or None when it does."""
    if not has_kernels(x.device):
        return NO_TRITON if x.is_cuda else "x must be on a CUDA device"
    if not x.device == gate_up.device == down.device:
        return "x and the experts' weights must be on one CUDA device"
    if not (x.dtype == gate_up.dtype == down.dtype == torch.bfloat16):
        return f"the kernels take bfloat16, not {x.dtype} with weights {gate_up.dtype}, {down.dtype}"
    if needs_gradient(x, gate_up, down):
        return "the kernels have no gradient"
    if _grouped_mm() is None or why_too_old(x.device) is not None:
        return "this torch or device has no grouped_mm"
    if gate_up.stride(-1) != 1 or down.stride(-1) != 1 or gate_up.shape[-1] % 8 or down.shape[-1] % 8:
        return "rows of the experts' weights must be contiguous and a multiple of 8 wide"
    return None


def routed_experts_reference(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: Shared | None = None,
) -> torch.Tensor:
    """Arguments and results as `routed_experts`, one expert at a time in PyTorch."""
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for expert in range(gate_up.shape[0]):
        token, position = torch.where(experts == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(0, token, rows.to(out.dtype) * weights[token, position, None].to(out.dtype))
    out = out.to(x.dtype)
    if shared is not None:
        out += F.linear(F.silu(F.linear(x, shared[0])) * F.linear(x, shared[1]), shared[2])
    return out


@custom_op(lambda x, *_: x.new_empty(x.shape))
def _routed_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
) -> torch.Tensor:
    shared = None if gate is None or up is None or shared_down is None else (gate, up, shared_down)
    return _EXPERTS(x.device, x, experts, weights, gate_up, down, shared, None)


def _why_not_vector(x: torch.Tensor, *_: Any) -> str | None:
    return None if x.shape[0] <= VECTOR_TOKENS else f"it is for at most {VECTOR_TOKENS} tokens"


def _by_token(*arguments: Any) -> torch.Tensor:
    return experts_vector(*arguments)


def _by_expert(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    accumulate: torch.Tensor | None = arguments[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if accumulate is None else accumulate
    _grouped(out, x, *arguments)
    return out


def _in_pytorch(*arguments: Any) -> torch.Tensor:
    accumulate: torch.Tensor | None = arguments[-1]
    out = routed_experts_reference(*arguments[:-1])
    return out if accumulate is None else accumulate.add_(out)


def _example(new: Callable[..., torch.Tensor], tokens: int) -> tuple[Any, ...]:
    experts, weights = new(tokens, 4, dtype=torch.int64), new(tokens, 4, dtype=torch.float32)
    return new(tokens, 2048), experts, weights, new(64, 3072, 2048), new(64, 2048, 1536), None, None


_EXPERTS = Operation(
    "routed_experts",
    Backend("Triton, token by token", _why_not_vector, _by_token, optional=True),
    Backend("Triton and grouped matmuls", takes_all, _by_expert),
    Backend("PyTorch", takes_all, _in_pytorch),
    prefill=lambda new: _example(new, 8192),
    token=lambda new: _example(new, 1),
)


def _grouped(
    out: torch.Tensor,
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: Shared | None,
    base: torch.Tensor | None,
) -> None:
    """Write `base + result` to `out`, in equal blocks of at least one token; nothing waits for the device."""
    grouped_mm: Any = _grouped_mm()
    tokens, k = experts.shape
    count, inner = down.shape[0], down.shape[2]
    blocks = -(-tokens // block_tokens(x, k, inner))
    step = -(-tokens // blocks)
    place, ends = group_by_expert(experts, count, step)
    for block in range(ends.shape[0]):
        first, last = block * step, min((block + 1) * step, tokens)
        part = x[first:last]
        rows = copy_rows(part, place[first:last])
        both = grouped_mm(rows, gate_up.transpose(1, 2), offs=ends[block])
        del rows
        hidden = gated(both[:, :inner], both[:, inner:])
        del both
        routed = grouped_mm(hidden, down.transpose(1, 2), offs=ends[block])
        always = None
        if shared is not None:
            always = F.linear(gated(F.linear(part, shared[0]), F.linear(part, shared[1])), shared[2])
        part_base = None if base is None else base[first:last]
        combine(routed, place[first:last], weights[first:last], always, part_base, out[first:last])
        del routed, always, hidden


def group_by_expert(
    experts: torch.Tensor, count: int, block: int, allow_triton: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of (token, expert) pairs in the experts' order, block by block of tokens.

    Args:
        experts: int64 `[T, K]`, in 0 .. count - 1.
        count: experts.
        block: tokens of a block.
        allow_triton: count in Triton on CUDA; False is PyTorch anywhere.

    Returns:
        int64 `[T, K]`: each pair's place within its block, among an expert's pairs by token; int32
        `[ceil(T / block), count]`: where in its block each expert's pairs end.
    """
    return _GROUPS(experts.device, experts, count, block, allow_triton=allow_triton)


def _group_by_sorting(experts: torch.Tensor, count: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, k = experts.shape
    blocks, device = -(-tokens // block), experts.device
    # One sort by (block, expert) serves all blocks.
    token_block = torch.arange(tokens, device=device, dtype=torch.int32).div_(block, rounding_mode="floor")
    keys, order = torch.sort((experts.to(torch.int32) + count * token_block[:, None]).flatten(), stable=True)
    ends = torch.arange(blocks * count, device=device, dtype=torch.int32)
    ends = torch.searchsorted(keys, ends, right=True, out_int32=True).view(blocks, count)
    ends = ends - block * k * torch.arange(blocks, device=device, dtype=torch.int32)[:, None]
    place = torch.empty_like(order)
    place[order] = torch.arange(tokens * k, device=device) % (block * k)
    return place.view(tokens, k), ends


def _why_not_counted(experts: torch.Tensor, count: int, block: int) -> str | None:
    return None if count <= MAX_COUNTED else f"it counts at most {MAX_COUNTED} experts"


_GROUPS = Operation(
    "group_by_expert",
    Backend("Triton", _why_not_counted, group_by_expert_triton, optional=True),
    Backend("PyTorch", takes_all, _group_by_sorting),
    prefill=lambda new: (new(8192, 4, dtype=torch.int64), 64, 8192),
)


def block_tokens(x: torch.Tensor, k: int, inner: int) -> int:
    """Tokens of `x [T, D]` in a block, of `k` experts of `inner` width each."""
    # The most at once: rows by expert and both halves of their projection, or these and the gated half.
    row = x.element_size() * k * max(x.shape[1] + 2 * inner, 3 * inner)
    return max(1, BLOCK_BYTES // row)


def _grouped_mm() -> Callable[..., Any] | None:
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
