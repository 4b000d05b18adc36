"""Matrix-vector products in Triton: one program makes a few outputs of one token, of one of several weights.

Legend: D width of the input, N0 to N3 outputs of the weights.
"""

from __future__ import annotations

import torch

from ..common.early_launch import early_launch, wait_for_kernels_ahead
from ..common.kernel_launch import launcher, rows_contiguous
from ..common.triton_support import tl, triton

MAX_WEIGHTS = 4
# Widest rows that are normed: a program must hold all of one.
MAX_NORMED = 2048
# Weights that a program holds at once, in entries.
TILE = 4096


def vector_linear_triton(x, weights, norm=None, eps=0.0, base=None, scale=None) -> torch.Tensor:
    """As `kernels.vector_linear.vector_linear`, for one dtype and contiguous rows, `MAX_NORMED` wide if normed.

    With a `scale` as `wide_vector_linear`: results are fp32, and weights may be.
    """
    tokens, width = x.shape
    sizes = [weight.shape[0] for weight in weights]
    total = sum(sizes)
    out = torch.empty(tokens, total, dtype=x.dtype if scale is None else torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    columns = min(MAX_NORMED, triton.next_power_of_2(width))
    rows = max(1, TILE // columns)
    padded = [*weights, *[weights[0]] * (MAX_WEIGHTS - len(weights))]
    sizes += [0] * (MAX_WEIGHTS - len(weights))
    tiles = sum(triton.cdiv(size, rows) for size in sizes)
    x = rows_contiguous(x)
    launcher(vector_linear_kernel, (tokens, tiles), x)(
        x,
        *padded,
        out,
        out if norm is None else norm,
        out if base is None else base,
        eps,
        1.0 if scale is None else scale,
        x.stride(0),
        0 if base is None else base.stride(0),
        *(weight.stride(0) for weight in padded),
        D=width,
        N0=sizes[0],
        N1=sizes[1],
        N2=sizes[2],
        N3=sizes[3],
        ROWS=rows,
        COLUMNS=columns,
        HAS_NORM=norm is not None,
        HAS_BASE=base is not None,
        HAS_SCALE=scale is not None,
        num_warps=4,
        **early_launch(),
    )
    return out


if triton is not None:

    @triton.jit
    def vector_linear_kernel(
        x,
        weight0,
        weight1,
        weight2,
        weight3,
        out,
        norm,
        base,
        eps,
        scale,
        x_stride,
        base_stride,
        stride0,
        stride1,
        stride2,
        stride3,
        D: tl.constexpr,
        N0: tl.constexpr,
        N1: tl.constexpr,
        N2: tl.constexpr,
        N3: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_BASE: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """ROWS outputs of one token; the second grid axis counts the tiles of all weights."""
        token = tl.program_id(0).to(tl.int64)
        tile = tl.program_id(1)
        END0: tl.constexpr = (N0 + ROWS - 1) // ROWS
        END1: tl.constexpr = END0 + (N1 + ROWS - 1) // ROWS
        END2: tl.constexpr = END1 + (N2 + ROWS - 1) // ROWS
        lane = tl.arange(0, ROWS)
        if tile < END0:
            row = tile * ROWS + lane
            real = row < N0
            rows = weight0 + row.to(tl.int64) * stride0
            target = row
        elif tile < END1:
            row = (tile - END0) * ROWS + lane
            real = row < N1
            rows = weight1 + row.to(tl.int64) * stride1
            target = N0 + row
        elif tile < END2:
            row = (tile - END1) * ROWS + lane
            real = row < N2
            rows = weight2 + row.to(tl.int64) * stride2
            target = N0 + N1 + row
        else:
            row = (tile - END2) * ROWS + lane
            real = row < N3
            rows = weight3 + row.to(tl.int64) * stride3
            target = N0 + N1 + N2 + row
        dtype = out.dtype.element_ty
        column = tl.arange(0, COLUMNS)
        x += token * x_stride
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in tl.static_range(0, D, COLUMNS):
            inside = first + column < D
            weight = tl.load(rows[:, None] + first + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            if first == 0:
                wait_for_kernels_ahead(EARLY)
            value = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                # The whole row is here. Rounded where a norm of its own would.
                value = (value * tl.rsqrt(tl.sum(value * value, 0) / D + eps)).to(dtype).to(tl.float32)
                value = (
                    (value * tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
                )
            acc += weight.to(tl.float32) * value[None, :]
        total = tl.sum(acc, 1)
        if HAS_SCALE:
            # Rounded where a linear layer would, if it is not fp32.
            total = total.to(weight0.dtype.element_ty).to(tl.float32) * scale
        total = total.to(dtype)
        if HAS_BASE:
            total = (total.to(tl.float32) + tl.load(base + token * base_stride + target, mask=real).to(tl.float32)).to(
                dtype
            )
        tl.store(out + token * (N0 + N1 + N2 + N3) + target, total, mask=real)
