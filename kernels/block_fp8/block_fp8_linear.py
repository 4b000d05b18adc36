"""Linear layers with block fp8 weights, without gradient: many rows, or one or two as decoding has them.

Many rows on a GPU with fp8 units are quantised by token and 128 columns, and on Hopper multiplied by cuBLASLt. Few,
and any without such units, meet weights that are widened as they are read; PyTorch dequantises slab by slab. Weights
are never whole in another dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..common.argument_checks import check_floats, check_shape, check_tensors
from ..common.custom_op import custom_op
from ..common.device_target import has_capability
from ..common.dispatch import Backend, Operation, takes_all
from ..common.triton_support import HALF_PRECISION, has_kernels, needs_gradient
from ..norm_rope_linear.rms_norm import rms_norm
from .block_fp8_format import E4M3, check_weight, scale_grid
from .block_fp8_linear_cublas import block_fp8_linear_cublas, why_not_cublas
from .block_fp8_linear_triton import block_fp8_linear_triton
from .block_fp8_pieces_triton import linear_in_pieces, why_not_in_pieces
from .block_fp8_reference import linear_reference
from .block_fp8_vector_triton import MAX_WEIGHTS, block_fp8_vector_linear_triton

# Blocks that the kernels take.
KERNEL_BLOCK = (128, 128)
# Up to so many tokens each reads the weights for itself.
VECTOR_TOKENS = 2
# Up to so many rows reading the weights takes the time, and activations stay what they are.
WIDENED_TOKENS = 32


def block_fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    *,
    block_size: tuple[int, int] = KERNEL_BLOCK,
    base: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    allow_triton: bool = True,
) -> torch.Tensor:
    """`base + x W^T`, W the weight whose blocks are multiplied by their scales.

    Args:
        x: `[T, D]`, bf16, fp16, fp32 or fp64; kernels take the first two.
        weight: float8_e4m3fn `[N, D]`.
        scales: `[ceil(N / block_size[0]), ceil(D / block_size[1])]`, fp32 or float8_e8m0fnu.
        block_size: rows and columns that share a scale; kernels take 128 x 128.
        base: `[T, N]` to add, or None; a bias as `bias.expand(T, -1)`.
        out: `[T, N]` to write, may be `base`; made when None. Not inside `torch.compile`.
        allow_triton: use the kernels on a GPU; False is PyTorch anywhere.

    Returns:
        `[T, N]` in `x`'s dtype: `out` if given. No gradient flows.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    name = "block_fp8_linear"
    check_tensors(name, x=x, weight=weight, base=base, out=out)
    check_floats(name, x=x, base=base, out=out)
    check_weight(name, "weight", weight, scales, block_size)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: x must be [T, D] with a column, got {tuple(x.shape)}")
    check_shape(name, "weight", weight, "[N, D] of x's D", (weight.shape[0], x.shape[1]))
    for key, value in {"base": base, "out": out}.items():
        if value is not None:
            check_shape(name, key, value, "[T, N]", (x.shape[0], weight.shape[0]), x.dtype)
    if out is None:
        return _block_fp8_linear(x, weight, scales, list(block_size), base, allow_triton)
    return _LINEAR(x.device, x, weight, scales, block_size, base, out, allow_triton=allow_triton)


def block_fp8_vector_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """The outputs of linear layers side by side for one or two tokens, in one launch: `base + rms_norm(x) W^T`.

    Args:
        x: `[T, D]`, half precision.
        weights: up to `MAX_WEIGHTS` of float8_e4m3fn `[N_i, D]`.
        scales: of each, in blocks of 128 x 128, fp32 or float8_e8m0fnu.
        norm: weight `[D]` of an RMSNorm that `x` has yet to pass, or None. It is not rounded in between.
        eps: of that norm.
        base: `[T, N]` to add, or None.

    Returns:
        `[T, N]`, N the sum of N_i. No gradient flows.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    name = "block_fp8_vector_linear"
    check_tensors(name, x=x, norm=norm, base=base, **{f"weights[{i}]": weight for i, weight in enumerate(weights)})
    check_floats(name, x=x, norm=norm, base=base)
    if x.dim() != 2 or x.shape[1] == 0 or not weights or len(weights) != len(scales):
        raise ValueError(
            f"{name}: x must be [T, D] with a column and as many scales as weights, at least one; got "
            f"{tuple(x.shape)}, {len(weights)} and {len(scales)}"
        )
    for i, (weight, grid) in enumerate(zip(weights, scales)):
        check_weight(name, f"weights[{i}]", weight, grid, KERNEL_BLOCK)
        check_shape(name, f"weights[{i}]", weight, "[N, D] of x's D", (weight.shape[0], x.shape[1]))
    if norm is not None:
        check_shape(name, "norm", norm, "[D]", x.shape[1:])
    if base is not None:
        check_shape(name, "base", base, "[T, N]", (x.shape[0], sum(weight.shape[0] for weight in weights)))
    return _block_fp8_vector_linear(x, list(weights), list(scales), norm, eps, base)


def takes_block_fp8_vector_linear(x: torch.Tensor, weights: Sequence[torch.Tensor], block_size: object) -> bool:
    """Whether `block_fp8_vector_linear` runs these in Triton and is meant for them: `x [T, D]` of few tokens."""
    return (
        has_kernels(x.device)
        and 0 < x.shape[0] <= VECTOR_TOKENS
        and len(weights) <= MAX_WEIGHTS
        and tuple(block_size) == KERNEL_BLOCK  # type: ignore[arg-type]
        and x.dtype in HALF_PRECISION
        and not needs_gradient(x)
        and all(weight.device == x.device and weight.stride(-1) == 1 for weight in weights)
        and not torch.is_autocast_enabled("cuda")
    )


def multiplies_e4m3(device: torch.device) -> bool:
    """Whether a device's matrix units take e4m3; the interpreter's do."""
    return device.type != "cuda" or has_capability(device, 89)


def why_no_kernels(x: torch.Tensor, block_size: Sequence[int], *weights: torch.Tensor) -> str | None:
    """Why the block fp8 kernels do not take such activations and weights, or None when they do."""
    if tuple(block_size) != KERNEL_BLOCK:
        return f"blocks are {block_size[0]} x {block_size[1]}, and kernels take 128 x 128"
    if x.dtype not in HALF_PRECISION:
        return f"the kernels take bf16 and fp16, not {x.dtype}"
    if any(weight.stride(-1) != 1 for weight in weights):
        return "rows of the weights must be contiguous"
    return None


@custom_op(lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]))
def _block_fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    block_size: list[int],
    base: torch.Tensor | None,
    allow_triton: bool,
) -> torch.Tensor:
    size = block_size[0], block_size[1]
    return _LINEAR(x.device, x, weight, scales, size, base, None, allow_triton=allow_triton)


def _why_not_triton(x, weight, scales, block_size, base, out) -> str | None:
    return why_no_kernels(x, block_size, weight)


def _why_not_vector(x, weight, scales, block_size, base, out) -> str | None:
    if out is not None or not takes_block_fp8_vector_linear(x, [weight], block_size):
        return f"it is for at most {VECTOR_TOKENS} tokens"
    return None


def _why_not_cublas(x, weight, scales, block_size, base, out) -> str | None:
    if x.shape[0] <= WIDENED_TOKENS:
        return f"it is for more than {WIDENED_TOKENS} tokens"
    return why_no_kernels(x, block_size, weight) or why_not_cublas(x, weight, scales)


def _by_cublas(x, weight, scales, block_size, base, out) -> torch.Tensor:
    return block_fp8_linear_cublas(x, weight, scales, base, out)


def _why_not_pieces(x, weight, scales, block_size, base, out) -> str | None:
    if out is not None:
        return "it makes its output itself"
    return why_no_kernels(x, block_size, weight) or why_not_in_pieces(x)


def _in_pieces(x, weight, scales, block_size, base, out) -> torch.Tensor:
    return linear_in_pieces(x, [weight], [scales], base=base)


def _as_vector(x, weight, scales, block_size, base, out) -> torch.Tensor:
    return block_fp8_vector_linear_triton(x, [weight], [scales], base=base)


def _in_triton(x, weight, scales, block_size, base, out) -> torch.Tensor:
    quantised = x.shape[0] > WIDENED_TOKENS and multiplies_e4m3(x.device)
    return block_fp8_linear_triton(x, weight, scales, base, out, quantised)


def _in_pytorch(x, weight, scales, block_size, base, out) -> torch.Tensor:
    made = linear_reference(x, weight, scales, block_size)
    made = made if base is None else made.add_(base)
    return made if out is None else out.copy_(made)


def _example_weight(new, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return new(rows, columns, dtype=E4M3), new(*scale_grid(rows, columns, KERNEL_BLOCK), dtype=torch.float32)


_LINEAR = Operation(
    "block_fp8_linear",
    Backend("Triton, tokens in two e4m3 pieces", _why_not_pieces, _in_pieces, optional=True),
    Backend("Triton, token by token", _why_not_vector, _as_vector, optional=True),
    Backend("cuBLASLt", _why_not_cublas, _by_cublas, optional=True),
    Backend("Triton", _why_not_triton, _in_triton),
    Backend("PyTorch", takes_all, _in_pytorch),
    prefill=lambda new: (new(8192, 7168), *_example_weight(new, 1536, 7168), KERNEL_BLOCK, None, None),
    token=lambda new: (new(1, 7168), *_example_weight(new, 1536, 7168), KERNEL_BLOCK, None, None),
)


@custom_op(lambda x, weights, *_: x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights)))
def _block_fp8_vector_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    norm: torch.Tensor | None,
    eps: float,
    base: torch.Tensor | None,
) -> torch.Tensor:
    return _VECTOR(x.device, x, weights, scales, norm, eps, base)


def _why_not_vectors(x, weights, scales, norm, eps, base) -> str | None:
    if len(weights) > MAX_WEIGHTS:
        return f"it takes at most {MAX_WEIGHTS} weights"
    if len({grid.dtype for grid in scales}) > 1:
        return "scales are of several kinds"
    return why_no_kernels(x, KERNEL_BLOCK, *weights)


def _why_not_vectors_in_pieces(x, weights, scales, norm, eps, base) -> str | None:
    return _why_not_vectors(x, weights, scales, norm, eps, base) or why_not_in_pieces(x)


def _vectors_in_pytorch(x, weights, scales, norm, eps, base) -> torch.Tensor:
    if norm is not None:
        x = rms_norm(x, norm, eps, allow_triton=False)
    made = torch.cat([linear_reference(x, weight, grid) for weight, grid in zip(weights, scales)], dim=-1)
    return made if base is None else made.add_(base)


def _example_vectors(new) -> tuple:
    weights, scales = zip(_example_weight(new, 1536, 7168), _example_weight(new, 576, 7168))
    return new(1, 7168), list(weights), list(scales), None, 0.0, None


_VECTOR = Operation(
    "block_fp8_vector_linear",
    Backend("Triton, tokens in two e4m3 pieces", _why_not_vectors_in_pieces, linear_in_pieces, optional=True),
    Backend("Triton", _why_not_vectors, block_fp8_vector_linear_triton),
    Backend("PyTorch", takes_all, _vectors_in_pytorch),
    token=_example_vectors,
)
