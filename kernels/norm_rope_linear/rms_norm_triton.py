"""RMSNorm in Triton, alone and together with RoPE of the columns behind it. One program makes a few whole rows.

Legend: N normed entries, R rotated ones behind them.
"""

from __future__ import annotations

import torch

from ..common.early_launch import early_launch, wait_for_kernels_ahead
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton

# Entries that a program holds: rows times their width.
TILE = 4096


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `kernels.rms_norm.rms_norm`, for one dtype."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.numel():
        _launch(rows, out, weight, eps, weight, weight, rows.shape[0], 0, rotated=0, interleaved=False)
    return out


def latent_rows_triton(kv, weight, eps, cos, sin, interleaved, slot=None) -> torch.Tensor:
    """As `kernels.rms_norm.latent_rows`, for one dtype and a power of two of rotated columns."""
    rows = kv.reshape(-1, kv.shape[-1])
    out = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device) if slot is None else slot.rows
    if rows.numel():
        cos, sin = cos.contiguous(), sin.contiguous()
        angle_stride_b = 0 if cos.shape[0] == 1 else cos.stride(0)
        _launch(rows, out, weight, eps, cos, sin, kv.shape[1], angle_stride_b, cos.shape[-1], interleaved, slot)
    return out


def _launch(rows, out, weight, eps, cos, sin, tokens, angle_stride_b, rotated, interleaved, slot=None) -> None:
    normed = rows.shape[1] - rotated
    block = triton.next_power_of_2(normed)
    rows_each = max(1, TILE // block)
    tensors = (rows, out, weight.contiguous(), cos, sin)
    sizes = (eps, rows.shape[0], tokens)
    strides = (rows.stride(0), rows.stride(1), angle_stride_b)
    launcher(rms_norm_rope_kernel, (triton.cdiv(rows.shape[0], rows_each),), rows)(
        *tensors,
        *sizes,
        *strides,
        weight if slot is None else slot.position,
        out.stride(0),
        0 if slot is None else out.shape[1],
        N=normed,
        R=rotated,
        ROWS=rows_each,
        BLOCK=block,
        INTERLEAVED=interleaved,
        HAS_SLOT=slot is not None,
        num_warps=4 if rows_each * block <= TILE else 8,
        **early_launch(),
    )


if triton is not None:

    @triton.jit
    def rows_of_program(
        out,
        num_rows,
        tokens,
        position,
        out_stride_b,
        capacity,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        HAS_SLOT: tl.constexpr,
    ):
        """Rows of this program, which of them there are `[ROWS, 1]`, and where in `out` or its slot each begins."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        real = (row < num_rows)[:, None]
        if HAS_SLOT:
            place = tl.load(position) + row % tokens
            real &= (place < capacity)[:, None]
            out_rows = out + row // tokens * out_stride_b + place * WIDTH
        else:
            out_rows = out + row * WIDTH
        return row, real, out_rows

    @triton.jit(do_not_specialize=["num_rows", "tokens", "capacity"])
    def rms_norm_rope_kernel(
        x,
        out,
        weight,
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
        N: tl.constexpr,
        R: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        HAS_SLOT: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """ROWS rows: N entries normed, the R behind them rotated."""
        wait_for_kernels_ahead(EARLY)
        row, real, out_rows = rows_of_program(
            out, num_rows, tokens, position, out_stride_b, capacity, N + R, ROWS, HAS_SLOT
        )
        column = tl.arange(0, BLOCK)
        inside = real & (column < N)[None, :]
        x_rows = x + row * x_stride_row  # [ROWS]
        dtype = out.dtype.element_ty
        wide = tl.load(x_rows[:, None] + column[None, :] * x_stride_column, mask=inside, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 1) / N + eps)  # [ROWS]
        gain = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
        # Rounded before the gain too, as PyTorch does.
        normed = (wide * factor[:, None]).to(dtype).to(tl.float32) * gain[None, :]
        tl.store(out_rows[:, None] + column[None, :], normed.to(dtype), mask=inside)
        if R > 0:
            half = tl.arange(0, R // 2)
            tail = x_rows + N * x_stride_column
            if INTERLEAVED:
                both = tl.load(tail[:, None] + tl.arange(0, R)[None, :] * x_stride_column, mask=real, other=0.0)
                first, second = tl.split(tl.reshape(both, [ROWS, R // 2, 2]))
            else:
                first = tl.load(tail[:, None] + half[None, :] * x_stride_column, mask=real, other=0.0)
                second = tl.load(tail[:, None] + (half[None, :] + R // 2) * x_stride_column, mask=real, other=0.0)
            angle = (row // tokens * angle_stride_b + row % tokens * R)[:, None] + half[None, :]
            c = tl.load(cos + angle, mask=real, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=real, other=0.0).to(tl.float32)
            first, second = first.to(tl.float32), second.to(tl.float32)
            low = out_rows[:, None] + N + half[None, :]
            tl.store(low, (first * c - second * s).to(dtype), mask=real)
            tl.store(low + R // 2, (second * c + first * s).to(dtype), mask=real)

else:  # Without Triton the kernels that call it do not exist either; importing its name must work.
    rows_of_program = None
