"""Gated experts of a mixture with block fp8 weights, routed and shared, for tokens that know their experts.

Few tokens read the chosen experts' weights once, in two matrix-vector kernels; many go through grouped products in
blocks whose temporaries are bounded. PyTorch takes one expert at a time, dequantised for the time of its product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..common.argument_checks import check_experts, check_floats, check_shape, check_tensors
from ..common.custom_op import custom_op
from ..common.device_target import device_target
from ..common.dispatch import Backend, Operation, takes_all
from ..experts.routed_experts import MAX_COUNTED, VECTOR_TOKENS, group_by_expert
from ..experts.routed_experts_triton import combine, gated
from .block_fp8_experts_hopper_gluon import hopper_takes
from .block_fp8_experts_pieces_triton import experts_in_pieces
from .block_fp8_experts_triton import grouped_experts
from .block_fp8_format import E4M3, check_weight, is_ue8m0, scale_grid
from .block_fp8_linear import KERNEL_BLOCK, WIDENED_TOKENS, multiplies_e4m3, why_no_kernels
from .block_fp8_linear_cublas import ALIGNED_TOKENS, multiply_by_cublas, why_not_cublas
from .block_fp8_linear_triton import activations_of, multiply
from .block_fp8_pieces_triton import why_not_in_pieces
from .block_fp8_reference import GROUP, linear_reference
from .block_fp8_vector_triton import block_fp8_experts_vector

# Temporaries of a block of tokens, in bytes: large ones, every product has a tail an expert.
BLOCK_BYTES = 640 * 2**20
# Up to so many an expert, tiles of 128 rows are half empty.
HOPPER_TOKENS = 64

Matrix = tuple[torch.Tensor, torch.Tensor]
Shared = tuple[Matrix, Matrix, Matrix]


def block_fp8_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    *,
    shared: Shared | None = None,
    accumulate: torch.Tensor | None = None,
    block_size: tuple[int, int] = KERNEL_BLOCK,
    allow_triton: bool = True,
) -> torch.Tensor:
    """`sum_j weights[t, j] * expert_j(x[t]) + shared(x[t])`, where `expert(x) = down (silu(gate x) * up x)`.

    Every weight comes with its scales, fp32 or float8_e8m0fnu, `grid(n, d) = [ceil(n / rows), ceil(d / columns)]` for
    n rows and d columns in blocks of rows x columns.

    Args:
        x: `[T, D]`, bf16, fp16, fp32 or fp64; kernels take the first two.
        experts: int64 `[T, K]`, in 0 .. E - 1. On a CPU others are refused; a GPU does not look, and reads what is not
            a weight.
        weights: fp32 `[T, K]`.
        gate_up: float8_e4m3fn `[E, 2 I, D]`, gate above up, and scales `[E, 2 * grid(I, D)]`, the gate's above up's.
        down: float8_e4m3fn `[E, D, I]`, and scales `[E, grid(D, I)]`.
        shared: `gate [J, D]`, `up [J, D]`, `down [D, J]` of an expert that every token takes, with scales, or None.
        accumulate: contiguous `[T, D]` to add the result to, in place; not inside `torch.compile`.
        block_size: rows and columns that share a scale; kernels take 128 x 128.
        allow_triton: use the kernels on a GPU; False is PyTorch anywhere.

    Returns:
        `[T, D]`: `accumulate` if given. No gradient flows.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
        IndexError: an expert that there is not, on a CPU.
    """
    _check_arguments(x, experts, weights, gate_up, down, shared, accumulate, block_size)
    if accumulate is None:
        of_shared = [] if shared is None else [tensor for matrix in shared for tensor in matrix]
        return _block_fp8_experts(x, experts, weights, *gate_up, *down, of_shared, list(block_size), allow_triton)
    arguments = x, experts, weights, gate_up, down, shared, accumulate, block_size
    return _EXPERTS(x.device, *arguments, allow_triton=allow_triton)


def _check_arguments(x, experts, weights, gate_up, down, shared, accumulate, block_size) -> None:
    name = "block_fp8_experts"
    check_tensors(name, x=x, experts=experts, weights=weights, accumulate=accumulate, gate_up=gate_up[0], down=down[0])
    check_floats(name, x=x, weights=weights, accumulate=accumulate)
    check_weight(name, "gate_up", gate_up[0], gate_up[1], block_size, halves=2)
    check_weight(name, "down", down[0], down[1], block_size)
    if x.dim() != 2 or experts.dim() != 2 or gate_up[0].dim() != 3 or down[0].dim() != 3:
        raise ValueError(
            f"{name}: x [T, D], experts [T, K], gate_up [E, 2 I, D] and down [E, D, I] do not fit: got "
            f"{tuple(x.shape)}, {tuple(experts.shape)}, {tuple(gate_up[0].shape)} and {tuple(down[0].shape)}"
        )
    (tokens, width), (count, _, inner) = x.shape, down[0].shape
    check_shape(name, "down", down[0], "[E, D, I]", (count, width, inner))
    check_shape(name, "gate_up", gate_up[0], "[E, 2 I, D]", (count, 2 * inner, width))
    check_shape(name, "experts", experts, "[T, K]", (tokens, experts.shape[1]), torch.int64)
    check_shape(name, "weights", weights, "[T, K]", experts.shape)
    if shared is not None:
        if len(shared) != 3:
            raise ValueError(f"{name}: shared must be gate, up and down with their scales, got {len(shared)}")
        for part, matrix in zip(("gate", "up", "down"), shared):
            check_tensors(name, x=x, **{f"shared {part}": matrix[0]})
            check_weight(name, f"shared {part}", matrix[0], matrix[1], block_size)
        rows = shared[0][0].shape[0]
        check_shape(name, "shared gate", shared[0][0], "[J, D]", (rows, width))
        check_shape(name, "shared up", shared[1][0], "[J, D]", (rows, width))
        check_shape(name, "shared down", shared[2][0], "[D, J]", (width, rows))
    if accumulate is not None:
        check_shape(name, "accumulate", accumulate, "[T, D]", x.shape)
        if accumulate.dtype != x.dtype or not accumulate.is_contiguous():
            raise ValueError(f"{name}: accumulate must be contiguous {x.dtype}, as x, got {accumulate.dtype}")
    check_experts(name, experts, count)


def block_fp8_experts_reference(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    shared: Shared | None = None,
    block_size: tuple[int, int] = KERNEL_BLOCK,
) -> torch.Tensor:
    """Arguments and results as `block_fp8_experts`, one expert at a time in PyTorch."""
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for expert in experts.unique().tolist():
        token, position = torch.where(experts == expert)
        gate, up = zip(gate_up[0][expert].chunk(2), gate_up[1][expert].chunk(2))
        rows = _gated_expert(x[token], gate, up, (down[0][expert], down[1][expert]), block_size)
        out.index_add_(0, token, rows.to(out.dtype) * weights[token, position, None].to(out.dtype))
    out = out.to(x.dtype)
    return out if shared is None else out.add_(_gated_expert(x, *shared, block_size))


def _gated_expert(x, gate: Matrix, up: Matrix, down: Matrix, block_size) -> torch.Tensor:
    hidden = F.silu(linear_reference(x, *gate, block_size)).mul_(linear_reference(x, *up, block_size))
    return linear_reference(hidden, *down, block_size)


@custom_op(lambda x, *_: x.new_empty(x.shape))
def _block_fp8_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down: torch.Tensor,
    down_scales: torch.Tensor,
    shared: list[torch.Tensor],
    block_size: list[int],
    allow_triton: bool,
) -> torch.Tensor:
    matrices: Any = tuple(zip(shared[::2], shared[1::2])) or None
    routed = (gate_up, gate_up_scales), (down, down_scales)
    size = block_size[0], block_size[1]
    return _EXPERTS(x.device, x, experts, weights, *routed, matrices, None, size, allow_triton=allow_triton)


def _why_not_triton(x, experts, weights, gate_up, down, shared, accumulate, block_size) -> str | None:
    matrices = (gate_up, down, *(shared or ()))
    if gate_up[0].shape[0] > MAX_COUNTED:
        return f"there are {gate_up[0].shape[0]} experts, and the kernels take {MAX_COUNTED}"
    if len({grid.dtype for _, grid in matrices}) > 1:
        return "scales are of several kinds"
    return why_no_kernels(x, block_size, *(weight for weight, _ in matrices))


def _why_not_vector(x, *arguments) -> str | None:
    if x.shape[0] > VECTOR_TOKENS:
        return f"it is for at most {VECTOR_TOKENS} tokens"
    return _why_not_triton(x, *arguments)


def _why_not_pieces(x, experts, weights, gate_up, down, shared, *rest) -> str | None:
    if shared is not None and shared[0][0].stride(0) != shared[1][0].stride(0):
        return "gate and up of the shared expert have rows of different lengths"
    reason = why_not_in_pieces(x, VECTOR_TOKENS)
    return reason or _why_not_triton(x, experts, weights, gate_up, down, shared, *rest)


def _in_pieces(x, experts, weights, gate_up, down, shared, accumulate, block_size) -> torch.Tensor:
    return experts_in_pieces(x, experts, weights, gate_up, down, shared, accumulate, accumulate)


def _why_not_hopper(x, experts, weights, gate_up, down, shared, accumulate, block_size) -> str | None:
    target, (count, width, inner) = device_target(x.device), down[0].shape
    if target.backend != "cuda" or target.arch != 90:
        return "it is for compute capability 9.0"
    if experts.numel() <= HOPPER_TOKENS * count:
        return f"there are at most {HOPPER_TOKENS} tokens an expert"
    if x.dtype != torch.bfloat16 or is_ue8m0(gate_up[1]) or width % (2 * GROUP):
        return f"it takes bf16, scales in fp32 and a hidden width by {2 * GROUP}"
    if not hopper_takes(width, inner, gate_up[0], down[0]):
        return f"it needs Gluon, widths by {GROUP} and contiguous weights"
    return _why_not_triton(x, experts, weights, gate_up, down, shared, accumulate, block_size)


def _by_token(x, experts, weights, gate_up, down, shared, accumulate, block_size) -> torch.Tensor:
    return block_fp8_experts_vector(x, experts, weights, gate_up, down, shared, accumulate, accumulate)


def _by_expert(
    x, experts, weights, gate_up, down, shared, accumulate, block_size, hopper: bool = False
) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if accumulate is None else accumulate
    experts_by_group(x, experts, weights, gate_up, down, shared, accumulate, out, hopper)
    return out


def _in_pytorch(x, experts, weights, gate_up, down, shared, accumulate, block_size) -> torch.Tensor:
    out = block_fp8_experts_reference(x, experts, weights, gate_up, down, shared, block_size)
    return out if accumulate is None else accumulate.add_(out)


def _example(new, tokens: int) -> tuple:
    def matrix(*shape: int, halves: int = 1) -> Matrix:
        down, across = scale_grid(shape[-2] // halves, shape[-1], KERNEL_BLOCK)
        return new(*shape, dtype=E4M3), new(*shape[:-2], halves * down, across, dtype=torch.float32)

    experts, weights = new(tokens, 8, dtype=torch.int64), new(tokens, 8, dtype=torch.float32)
    routed = matrix(256, 4096, 7168, halves=2), matrix(256, 7168, 2048)
    return new(tokens, 7168), experts, weights, *routed, None, None, KERNEL_BLOCK


_EXPERTS = Operation(
    "block_fp8_experts",
    Backend("Triton, tokens in two e4m3 pieces", _why_not_pieces, _in_pieces, optional=True),
    Backend("Triton, token by token", _why_not_vector, _by_token, optional=True),
    Backend("Gluon for Hopper", _why_not_hopper, partial(_by_expert, hopper=True), optional=True),
    Backend("Triton", _why_not_triton, _by_expert),
    Backend("PyTorch", takes_all, _in_pytorch),
    prefill=lambda new: _example(new, 8192),
    token=lambda new: _example(new, 1),
)


def experts_by_group(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    shared: Shared | None,
    base: torch.Tensor | None,
    out: torch.Tensor,
    hopper: bool = False,
) -> None:
    """Write `base + result` to `out`, in equal blocks of at least one token; nothing waits for the device.

    `hopper`: as `grouped_experts`.
    """
    (tokens, k), (count, _, inner) = experts.shape, down[0].shape
    # Rows by expert in between and as they come out.
    step = max(1, BLOCK_BYTES // (x.element_size() * k * (x.shape[1] + inner)))
    step = -(-tokens // -(-tokens // step))
    place, ends = group_by_expert(experts, count, step)
    units = multiplies_e4m3(x.device)
    for block in range(ends.shape[0]):
        first, last = block * step, min((block + 1) * step, tokens)
        part = x[first:last]
        narrow = units and (last - first) * k > WIDENED_TOKENS * count
        activations = activations_of(part, narrow)
        routed = grouped_experts(part, activations, place[first:last], ends[block], gate_up, down, hopper=hopper)
        always = None
        if shared is not None:
            if units and not narrow and last - first > WIDENED_TOKENS:
                activations = activations_of(part, True)
            always = _shared_expert(part, activations, shared)
        part_base = None if base is None else base[first:last]
        combine(routed, place[first:last], weights[first:last], always, part_base, out[first:last])
        del routed, always


def _shared_expert(
    x: torch.Tensor, activations: tuple[torch.Tensor, torch.Tensor | None], shared: Shared
) -> torch.Tensor:
    """The shared expert of `x [T, D]`, which is multiplied as `activations` have it."""
    gate, up = (_product(x, activations, matrix) for matrix in shared[:2])
    return _product(x, activations_of(gated(gate, up), activations[1] is not None), shared[2])


def _product(x: torch.Tensor, activations: tuple[torch.Tensor, torch.Tensor | None], matrix: Matrix) -> torch.Tensor:
    """Rows, as `activations` have them, times one weight, in the dtype and number of `x`."""
    tokens, (rows, factors) = x.shape[0], activations
    if factors is not None and tokens % ALIGNED_TOKENS == 0 and why_not_cublas(x, *matrix) is None:
        return multiply_by_cublas(rows, factors, *matrix, None, None, tokens)
    return multiply(rows, factors, *matrix, None, x.new_empty(tokens, matrix[0].shape[0]))
