"""Activations quantised by token and 128 columns in Triton, and what the block fp8 kernels share: scales, widening."""

from __future__ import annotations

import torch

from ..common.device_target import has_capability
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton
from .block_fp8_format import E4M3, is_ue8m0
from .block_fp8_reference import GROUP


def reads_e4m3(tensor: torch.Tensor) -> bool:
    """Whether kernels on a tensor's device convert e4m3 themselves; others are given its bytes."""
    return not tensor.is_cuda or has_capability(tensor.device, 89)


def as_kernels_read(weight: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and scales as kernels are given them: bytes where Triton knows no such dtype."""
    return (
        weight if reads_e4m3(weight) else weight.view(torch.uint8),
        scales.view(torch.uint8) if is_ue8m0(scales) else scales,
    )


def quantise_activations_triton(x: torch.Tensor, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `block_fp8_reference.quantise_activations`, of `rows` where `x` has fewer: the others are zero.

    Scales of a group are contiguous over rows.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, width = x.shape
    rows = tokens if rows is None else rows
    groups = triton.cdiv(width, GROUP)
    values = torch.empty(rows, width, dtype=E4M3, device=x.device)
    scales = torch.empty(groups, rows, dtype=torch.float32, device=x.device)
    if values.numel():
        block = 16
        launcher(quantise_activations_kernel, (triton.cdiv(rows, block), groups), x)(
            x, values, scales, tokens, rows, width, x.stride(0), ROWS=block, GROUP=GROUP, num_warps=4
        )
    return values, scales.t()


if triton is not None:

    @triton.jit
    def scale_of(places, mask, POWERS: tl.constexpr):
        """fp32 scales at `places`: as they stand, or of their exponents."""
        scale = tl.load(places, mask=mask, other=0)
        if POWERS:
            bits = scale.to(tl.int32)
            # The exponent of zero is a subnormal number's; 255 is no number.
            bits = tl.where(bits == 0, 0x400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
            scale = bits.to(tl.float32, bitcast=True)
        return scale

    @triton.jit
    def widened(tile, dtype: tl.constexpr):
        """e4m3, or its bytes, in `dtype`; exact."""
        if tile.dtype == tl.uint8:
            bits = tile.to(tl.int32)
            # fp32's exponents are 120 greater. Subnormal numbers are subnormal ones there, which no product flushes.
            made = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120
            wide = tl.where((bits & 0x7F) == 0x7F, float("nan"), made).to(dtype)
        else:
            wide = tile.to(dtype)
        return wide

    @triton.jit
    def quantised(wide):
        """e4m3 values `[ROWS, GROUP]` and scales `[ROWS]` of fp32 rows."""
        largest = tl.max(tl.abs(wide), 1)
        scale = tl.where(largest > 0.0, tl.div_rn(largest, 448.0), 1.0)
        scaled = wide * tl.div_rn(1.0, scale)[:, None]
        # A NaN stays one.
        above = tl.maximum(scaled, -448.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(above, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv), scale

    @triton.jit(do_not_specialize=["T", "ALL"])
    def quantise_activations_kernel(x, values, scales, T, ALL, D, x_stride, ROWS: tl.constexpr, GROUP: tl.constexpr):
        """ROWS of ALL rows, of which `x` has T, and one group of columns."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        group = tl.program_id(1)
        column = group * GROUP + tl.arange(0, GROUP)
        inside = (column < D)[None, :]
        mask = (row < T)[:, None] & inside
        wide = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value, scale = quantised(wide)
        tl.store(values + row[:, None] * D + column[None, :], value, mask=(row < ALL)[:, None] & inside)
        tl.store(scales + group.to(tl.int64) * ALL + row, scale, mask=row < ALL)
