"""LayerNorm and RoPE of index keys in Triton. One program makes a few whole rows.

Legend: D width of a key, R rotated entries at its front.
"""

from __future__ import annotations

import torch

from ..common.early_launch import early_launch, wait_for_kernels_ahead
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton
from .rms_norm_triton import rows_of_program

# Entries that a program holds: rows times their width.
TILE = 2048


def index_key_rows_triton(k, weight, bias, eps, cos, sin, interleaved, slot=None) -> torch.Tensor:
    """As `kernels.index_keys.index_key_rows`, for one dtype and a power of two of rotated entries."""
    width, rotated = k.shape[-1], cos.shape[-1]
    rows = k.reshape(-1, width)
    out = torch.empty(k.shape, dtype=k.dtype, device=k.device) if slot is None else slot.rows
    if rows.numel() == 0:
        return out
    cos, sin = cos.contiguous(), sin.contiguous()
    block = triton.next_power_of_2(width)
    rows_each = max(1, TILE // block)
    tensors = (rows, out, weight.contiguous(), bias.contiguous(), cos, sin)
    sizes = (eps, rows.shape[0], k.shape[1])
    launcher(index_key_kernel, (triton.cdiv(rows.shape[0], rows_each),), rows)(
        *tensors,
        *sizes,
        *rows.stride(),
        0 if cos.shape[0] == 1 else cos.stride(0),
        rows if slot is None else slot.position,
        out.stride(0),
        0 if slot is None else out.shape[1],
        D=width,
        R=rotated,
        ROWS=rows_each,
        BLOCK=block,
        INTERLEAVED=interleaved,
        HAS_SLOT=slot is not None,
        num_warps=4,
        **early_launch(),
    )
    return out


if triton is not None:

    @triton.jit(do_not_specialize=["num_rows", "tokens", "capacity"])
    def index_key_kernel(
        x,
        out,
        weight,
        bias,
        cos,
        sin,
        eps,
        num_rows,
        tokens,
        x_stride_row,
        x_stride_column,
        angle_stride_b,
        position,
        out_stride_b,
        capacity,
        D: tl.constexpr,
        R: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        HAS_SLOT: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """ROWS rows: D entries normed, then the first R rotated."""
        wait_for_kernels_ahead(EARLY)
        row, real, out_rows = rows_of_program(
            out, num_rows, tokens, position, out_stride_b, capacity, D, ROWS, HAS_SLOT
        )
        out_rows = out_rows[:, None]
        column = tl.arange(0, BLOCK)
        inside = real & (column < D)[None, :]
        x_rows = (x + row * x_stride_row)[:, None]  # [ROWS, 1]
        dtype = out.dtype.element_ty
        wide = tl.load(x_rows + column[None, :] * x_stride_column, mask=inside, other=0.0).to(tl.float32)
        mean = (tl.sum(wide, 1) / D)[:, None]
        centred = tl.where(inside, wide - mean, 0.0)
        factor = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
        gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
        normed = centred * factor * gain[None, :] + shift[None, :]
        tl.store(out_rows + column[None, :], normed.to(dtype), mask=inside & (column >= R)[None, :])
        half = tl.arange(0, R // 2)
        if INTERLEAVED:
            low, high = 2 * half, 2 * half + 1
        else:
            low, high = half, half + R // 2
        first = _normed(x_rows, weight, bias, low, x_stride_column, mean, factor, real, dtype)
        second = _normed(x_rows, weight, bias, high, x_stride_column, mean, factor, real, dtype)
        angle = (row // tokens * angle_stride_b + row % tokens * R)[:, None] + half[None, :]
        c = tl.load(cos + angle, mask=real, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=real, other=0.0).to(tl.float32)
        tl.store(out_rows + half[None, :], (first * c - second * s).to(dtype), mask=real)
        tl.store(out_rows + half[None, :] + R // 2, (second * c + first * s).to(dtype), mask=real)

    @triton.jit
    def _normed(x_rows, weight, bias, column, x_stride_column, mean, factor, real, dtype: tl.constexpr):
        """Some columns of the normed rows, rounded as a norm of its own would."""
        x = tl.load(x_rows + column[None, :] * x_stride_column, mask=real, other=0.0).to(tl.float32)
        gain = tl.load(weight + column).to(tl.float32)
        shift = tl.load(bias + column).to(tl.float32)
        return ((x - mean) * factor * gain[None, :] + shift[None, :]).to(dtype).to(tl.float32)
