"""Rotary position embedding of strided rows: PyTorch, and one Triton pass without temporaries.

Source: RoFormer (Su et al. 2021), in the two layouts that DSA models use.
"""

from __future__ import annotations

from typing import Any

import torch

from ..common.argument_checks import check_angles, check_floats, check_shape, check_tensors
from ..common.dispatch import Backend, Operation, takes_all
from ..common.triton_support import why_not_fused
from .rotary_triton import rotate_into_triton


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate pairs of entries of `x` by the angles of their positions.

    Args:
        x: `[B, S, ..., R]`.
        cos: `[B or 1, S, R]`, the cosines of R / 2 angles, twice.
        sin: likewise.
        interleaved: pairs are neighbours (0, 1), (2, 3), ... (True) or halves apart (False). Interleaved results come
            out with the halves apart, as in transformers: products of queries and keys are the same.

    Returns:
        `[B, S, ..., R]` in `x`'s dtype.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    check_angles("rotate", x, cos, sin)
    half = x.shape[-1] // 2
    shape = (*cos.shape[:2], *(1,) * (x.dim() - 3), half)
    cos, sin = cos[..., :half].view(shape), sin[..., :half].view(shape)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_leading(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """`x [B, S, ..., D]` with its first R entries rotated, and the rest as they are; arguments as `rotate`.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    check_leading_angles("rotate_leading", x, cos, sin)
    first, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    return torch.cat((rotate(first, cos, sin, interleaved), rest), dim=-1)


def check_leading_angles(operation: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`cos` and `sin` rotate the first entries of `x [B, S, ..., D]`.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    check_tensors(operation, x=x, cos=cos)
    if x.dim() == 0 or cos.dim() == 0 or cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"{operation}: cos [B or 1, S, R] {tuple(cos.shape)} turns more entries than {tuple(x.shape)} has"
        )
    check_angles(operation, x, cos, sin, cos.shape[-1])


def rotate_into(
    out: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    allow_triton: bool = True,
) -> None:
    """Write `rotate(x, cos, sin, interleaved)` to `out`, without gradient.

    Args:
        out: `[B, S, H, R]`, any strides; may be `x`.
        x: `[B, S, H, R]`, any strides.
        cos: `[B or 1, S, R]`.
        sin: likewise.
        interleaved: as `rotate`.
        allow_triton: use the Triton kernel on CUDA; False is PyTorch anywhere.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    check_tensors("rotate_into", x=x, out=out)
    if x.dim() != 4:
        raise ValueError(f"rotate_into: x must be [B, S, H, R], got {tuple(x.shape)}")
    check_shape("rotate_into", "out", out, "that of x, [B, S, H, R]", x.shape)
    check_floats("rotate_into", out=out)
    check_angles("rotate_into", x, cos, sin)
    _INTO(x.device, out, x, cos, sin, interleaved, allow_triton=allow_triton)


def why_not_rotated(width: int) -> str | None:
    """Why the kernels do not rotate rows of `width` entries, or None."""
    return "it turns a power of two of entries" if width & (width - 1) else None


def _why_not_triton(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any) -> str | None:
    return why_not_rotated(x.shape[-1]) or why_not_fused(x, out, cos, sin)


def _in_pytorch(out: torch.Tensor, *arguments: Any) -> None:
    out.copy_(rotate(*arguments))


_INTO = Operation(
    "rotate_into",
    Backend("Triton", _why_not_triton, rotate_into_triton, optional=True),
    Backend("PyTorch", takes_all, _in_pytorch),
    token=lambda new: (new(1, 1, 20, 64), new(1, 1, 20, 64), new(1, 1, 64), new(1, 1, 64), True),
)
