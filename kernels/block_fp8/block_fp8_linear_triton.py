"""Products with block fp8 weights in Triton, for any number of rows: e4m3 times e4m3 or, widened in registers, bf16.

Every 128 columns the sum of products is scaled and added up in fp32: tensor cores keep fewer bits of e4m3 products.

Legend: T rows (tokens), D columns of the weight, N its rows (outputs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.device_target import device_target
from ..common.kernel_constants import LARGE_SHARED_MEMORY
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton
from .block_fp8_activations_triton import as_kernels_read, quantise_activations_triton
from .block_fp8_format import is_ue8m0
from .block_fp8_reference import GROUP

# Tiles of so many rows of weights share what they read of the activations in L2.
SWIZZLE = 8
# Groups of columns that a program sums up at least when several share an output.
LEAST_GROUPS = 8


class Tiles(NamedTuple):
    """Rows and outputs of a program, and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int


def is_roomy(device: torch.device) -> bool:
    """Whether a program may use 160 KB of shared memory or more, as on A100, H100 and B200, instead of 99."""
    backend, arch, _ = device_target(device)
    return backend == "cuda" and arch in LARGE_SHARED_MEMORY


def linear_tiles(tokens: int, quantised: bool, roomy: bool) -> Tiles:
    """For so many rows, of quantised activations or of bf16 ones."""
    if not quantised and tokens <= 32:
        return Tiles(16 if tokens <= 16 else 32, 64, 4, 4)
    if tokens <= 64 or not roomy:
        return Tiles(64, 128, 4, 3 if quantised else 2)
    return Tiles(128, 128, 8, 4 if quantised else 3)


def block_fp8_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    base: torch.Tensor | None,
    out: torch.Tensor | None,
    quantised: bool,
) -> torch.Tensor:
    """As `block_fp8_linear.block_fp8_linear`, of 128 x 128 blocks and half-precision rows `x [T, D]`.

    `quantised`: multiply e4m3 by e4m3; otherwise weights are widened to `x`'s dtype.
    """
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    return multiply(*activations_of(x, quantised), weight, scales, base, out)


def activations_of(x: torch.Tensor, quantised: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is multiplied, with contiguous rows: e4m3 and factors, or `x` itself."""
    if quantised:
        return quantise_activations_triton(x)
    return x if x.stride(1) == 1 else x.contiguous(), None


def multiply(
    x: torch.Tensor,
    factors: torch.Tensor | None,
    weight: torch.Tensor,
    scales: torch.Tensor,
    base: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """`out = base + x W^T`, of rows `x [T, D]`; with `factors [T, groups]` these are e4m3.

    `base` has rows of `out`'s width, any stride between them (0: a bias), and may be `out`.
    """
    tokens, width = x.shape
    outputs = weight.shape[0]
    if out.numel() == 0:
        return out
    powers, quantised = is_ue8m0(scales), factors is not None
    weight, scales = as_kernels_read(weight, scales)
    tiles = linear_tiles(tokens, quantised, is_roomy(x.device))
    count = triton.cdiv(tokens, tiles.rows) * triton.cdiv(outputs, tiles.columns)
    splits = 1 if quantised else split_count(x.device, count, triton.cdiv(width, GROUP))
    parts = out
    if splits > 1:
        parts = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
    launcher(block_fp8_matmul_kernel, (count, splits), x)(
        x,
        x if factors is None else factors,
        weight,
        scales,
        out if base is None else base,
        parts,
        tokens,
        outputs,
        width,
        x.stride(0),
        0 if factors is None else factors.stride(1),
        weight.stride(0),
        scales.stride(0),
        0 if base is None else base.stride(0),
        parts.stride(-2),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        GROUP=GROUP,
        SWIZZLE=SWIZZLE,
        SPLITS=splits,
        WHOLE=width % GROUP == 0,
        QUANTISED=quantised,
        POWERS=powers,
        HAS_BASE=base is not None and splits == 1,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits > 1:
        launcher(sum_parts_kernel, (tokens, triton.cdiv(outputs, 1024)), out)(
            parts,
            out if base is None else base,
            out,
            tokens,
            outputs,
            0 if base is None else base.stride(0),
            out.stride(0),
            SPLITS=splits,
            BLOCK=1024,
            HAS_BASE=base is not None,
            num_warps=4,
        )
    return out


def split_count(device: torch.device, programs: int, groups: int) -> int:
    """Programs, a power of two, that share the columns of an output, so that few outputs fill the device."""
    processors, splits = device_target(device).processors, 1
    while 2 * splits * programs <= 2 * processors and groups >= 2 * splits * LEAST_GROUPS:
        splits *= 2
    return splits


if triton is not None:
    from .block_fp8_activations_triton import scale_of, widened

    @triton.jit(do_not_specialize=["T"])
    def block_fp8_matmul_kernel(
        x,
        factors,
        weight,
        scales,
        base,
        out,
        T,
        N,
        D,
        x_stride,
        factor_stride,
        weight_stride,
        scale_stride,
        base_stride,
        out_stride,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        GROUP: tl.constexpr,
        SWIZZLE: tl.constexpr,
        SPLITS: tl.constexpr,
        WHOLE: tl.constexpr,
        QUANTISED: tl.constexpr,
        POWERS: tl.constexpr,
        HAS_BASE: tl.constexpr,
    ):
        """ROWS x COLUMNS outputs, or one of SPLITS parts of their sums, as fp32 `[SPLITS, T, N]`."""
        pid = tl.program_id(0)
        row_tiles, column_tiles = tl.cdiv(T, ROWS), tl.cdiv(N, COLUMNS)
        band = pid // (SWIZZLE * row_tiles)
        wide = tl.minimum(column_tiles - band * SWIZZLE, SWIZZLE)
        inside_band = pid - band * SWIZZLE * row_tiles
        row_tile, column_tile = inside_band // wide, band * SWIZZLE + inside_band % wide
        row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = column_tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        # What is read beyond the edges is the last row's, and not stored.
        from_row, from_column = tl.minimum(row, T - 1), tl.minimum(column, N - 1)
        depth = tl.arange(0, GROUP)
        rows = x + from_row[:, None] * x_stride + depth[None, :]
        weights = weight + from_column[:, None] * weight_stride + depth[None, :]
        grid = scales + (column_tile * COLUMNS // GROUP) * scale_stride
        groups = tl.cdiv(D, GROUP)
        split = tl.program_id(1)
        first, last = split * groups // SPLITS, (split + 1) * groups // SPLITS
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for group in range(first, last):
            if WHOLE:
                a = tl.load(rows + group * GROUP)
                b = tl.load(weights + group * GROUP)
            else:
                inside = (group * GROUP + depth < D)[None, :]
                a = tl.load(rows + group * GROUP, mask=inside, other=0.0)
                b = tl.load(weights + group * GROUP, mask=inside, other=0.0)
            scale = scale_of(grid + group, group < groups, POWERS)
            if QUANTISED:
                factor = tl.load(factors + from_row + group * factor_stride)
                acc += tl.dot(a, tl.trans(b)) * (factor * scale)[:, None]
            else:
                acc += tl.dot(a, tl.trans(widened(b, x.dtype.element_ty))) * scale
        mask = (row < T)[:, None] & (column < N)[None, :]
        if SPLITS > 1:
            out += split.to(tl.int64) * T * N
        value = acc.to(out.dtype.element_ty)
        if HAS_BASE:
            before = tl.load(base + row[:, None] * base_stride + column[None, :], mask=mask, other=0.0)
            value = (value.to(tl.float32) + before.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * out_stride + column[None, :], value, mask=mask)

    @triton.jit(do_not_specialize=["T"])
    def sum_parts_kernel(
        parts,
        base,
        out,
        T,
        N,
        base_stride,
        out_stride,
        SPLITS: tl.constexpr,
        BLOCK: tl.constexpr,
        HAS_BASE: tl.constexpr,
    ):
        """`out = base +` the sum of fp32 `parts [SPLITS, T, N]`."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        total = tl.zeros([BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(parts + (split * T.to(tl.int64) + row) * N + column, mask=inside, other=0.0)
        value = total.to(out.dtype.element_ty)
        if HAS_BASE:
            before = tl.load(base + row * base_stride + column, mask=inside, other=0.0)
            value = (value.to(tl.float32) + before.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + column, value, mask=inside)
