"""Grouped products of experts with block fp8 weights for Hopper (sm90) in Gluon: 128 rows by 2 blocks of 128 weights.

Three warp groups a program. One copies tiles into shared memory, four groups of columns ahead; the other two multiply
64 rows each and add up in fp32 what the matrix units made of 128 columns, which keep too few bits to go on. They do
not wait for each other, so that one's sums run while the matrix units work for the other.

Legend: as `block_fp8_experts_triton`; M = 64 rows of a group, B = 128 weights of a block, G = 128 columns.
"""

from __future__ import annotations

from typing import Any

import torch

from ..common.gluon_support import (
    async_copy,
    async_load,
    barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton

# Rows of a program, half of them of either group that multiplies; weights of a block; columns that share a scale.
TILE_ROWS, BLOCK_ROWS, GROUP = 128, 128, 128
# Groups of columns on their way: 48 KB each.
STAGES = 4
# Registers of a thread of the second group and of the one that copies; the first has what is left of 64K.
SECOND_REGISTERS, COPY_REGISTERS = 216, 72


def hopper_takes(width: int, inner: int, *weights: torch.Tensor) -> bool:
    """Whether the kernels take experts of these widths: whole blocks, rows at multiples of 16 bytes."""
    return (
        gluon is not None
        and width % GROUP == 0
        and inner % GROUP == 0
        and all(weight.is_contiguous() and weight.data_ptr() % 16 == 0 for weight in weights)
    )


def grouped_product_hopper(
    rows: torch.Tensor,
    factors: torch.Tensor,
    source: torch.Tensor | None,
    tiles: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    out_factors: torch.Tensor | None,
    powers: bool,
    rounded: Any,
    band: int,
) -> None:
    """Every tile's rows times its expert's weights.

    Args:
        rows: e4m3 `[T, D]`, contiguous rows.
        factors: fp32 `[T, D / 128]`, contiguous over rows.
        source: int32 `[P]`, the row of a pair; None: its own.
        tiles: of `TILE_ROWS` rows, as `block_fp8_experts_triton.tile_map` makes them.
        weight: e4m3 `[E, N, D]`; with `out_factors` the gate's N / 2 rows above those of up.
        scales: of its blocks.
        out: `[P, N]`; with `out_factors` e4m3 `[P, N / 2]`, gated.
        out_factors: fp32 `[N / 256, P]`, or None.
        powers: scales are exponents.
        rounded: Triton's dtype that what is gated is rounded to.
        band: tiles of rows that go through the columns together.
    """
    pairs, most = out.shape[0], tiles.shape[1]
    experts, outputs, width = weight.shape
    gated = out_factors is not None
    blocks = outputs // BLOCK_ROWS
    steps = blocks // 2 if gated else triton.cdiv(blocks, 2)
    launcher(_grouped_product_kernel, (steps * most,), rows)(
        rows,
        factors,
        rows if source is None else source,
        tiles,
        weight,
        scales,
        out,
        factors if out_factors is None else out_factors,
        pairs,
        most,
        steps,
        blocks,
        width,
        rows.stride(0),
        factors.stride(1),
        out.stride(0),
        E=experts,
        BAND=band,
        GATED=gated,
        HAS_SOURCE=source is not None,
        POWERS=powers,
        ROUND=rounded if gated else tl.float32,
        num_warps=4,
    )


if gluon is not None:
    M, B, G = gl.constexpr(TILE_ROWS // 2), gl.constexpr(BLOCK_ROWS), gl.constexpr(GROUP)
    DEPTH = gl.constexpr(STAGES)
    GROUP_THREADS = gl.constexpr(128)
    SECOND, COPY = gl.constexpr(SECOND_REGISTERS), gl.constexpr(COPY_REGISTERS)

    @gluon.jit(do_not_specialize=["P", "most", "steps", "blocks"])
    def _grouped_product_kernel(
        rows,
        factors,
        source,
        tiles,
        weight,
        scales,
        out,
        out_factors,
        P,
        most,
        steps,
        blocks,
        weight_stride,
        row_stride,
        factor_stride,
        out_stride,
        E: gl.constexpr,
        BAND: gl.constexpr,
        GATED: gl.constexpr,
        HAS_SOURCE: gl.constexpr,
        POWERS: gl.constexpr,
        ROUND: gl.constexpr,
    ):
        pid = gl.program_id(0)
        first_tile = pid // (BAND * steps) * BAND
        inside = pid - first_tile * steps
        together = gl.minimum(most - first_tile, BAND)
        tile, step = first_tile + inside % together, inside // together
        expert = gl.load(tiles + tile)
        first_row = gl.load(tiles + most + tile)
        end = gl.load(tiles + 2 * most + tile)
        # Where there is no such tile there is nothing to do.
        groups = gl.where(expert < E, weight_stride // G, 0)
        end = gl.where(expert < E, end, 0)
        expert = gl.minimum(expert, E - 1).to(gl.int64)
        left = step if GATED else 2 * step
        right = step + steps if GATED else gl.minimum(2 * step + 1, blocks - 1)

        dtype: gl.constexpr = rows.dtype.element_ty
        shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
        a_first = gl.allocate_shared_memory(dtype, [DEPTH, M, G], shared)
        a_second = gl.allocate_shared_memory(dtype, [DEPTH, M, G], shared)
        b_left = gl.allocate_shared_memory(dtype, [DEPTH, B, G], shared)
        b_right = gl.allocate_shared_memory(dtype, [DEPTH, B, G], shared)
        full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(DEPTH):
            mbarrier.init(full.index(i), count=GROUP_THREADS)
            mbarrier.init(empty.index(i), count=2)
        fence_async_shared()
        barrier()

        weight += expert * (blocks * B).to(gl.int64) * weight_stride
        scale_rows = scales + expert * blocks * (weight_stride // G)
        left_scales, right_scales = scale_rows + left * (weight_stride // G), scale_rows + right * (weight_stride // G)
        place = (first_row, end, left, right, P, blocks, out_stride)
        gl.warp_specialize(
            [
                (
                    _multiply_group,
                    (
                        a_first,
                        b_left,
                        b_right,
                        full,
                        empty,
                        factors,
                        source,
                        left_scales,
                        right_scales,
                        groups,
                        factor_stride,
                        out,
                        out_factors,
                        place,
                        0,
                        GATED,
                        HAS_SOURCE,
                        POWERS,
                        ROUND,
                    ),
                ),
                (
                    _multiply_group,
                    (
                        a_second,
                        b_left,
                        b_right,
                        full,
                        empty,
                        factors,
                        source,
                        left_scales,
                        right_scales,
                        groups,
                        factor_stride,
                        out,
                        out_factors,
                        place,
                        1,
                        GATED,
                        HAS_SOURCE,
                        POWERS,
                        ROUND,
                    ),
                ),
                (
                    _copy_group,
                    (
                        a_first,
                        a_second,
                        b_left,
                        b_right,
                        full,
                        empty,
                        rows,
                        source,
                        weight,
                        first_row,
                        end,
                        left,
                        right,
                        groups,
                        weight_stride,
                        row_stride,
                        HAS_SOURCE,
                    ),
                ),
            ],
            [4, 4],
            [SECOND, COPY],
        )

    @gluon.jit
    def _copy_group(
        a_first,
        a_second,
        b_left,
        b_right,
        full,
        empty,
        rows,
        source,
        weight,
        first_row,
        end,
        left,
        right,
        groups,
        weight_stride,
        row_stride,
        HAS_SOURCE: gl.constexpr,
    ):
        """Tiles of rows and of both blocks of weights, group of columns after group."""
        copy: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
        depth = gl.arange(0, G, layout=gl.SliceLayout(0, copy))[None, :]
        lane = gl.arange(0, M, layout=gl.SliceLayout(1, copy))
        last = gl.maximum(end - 1, 0)
        upper, lower = gl.minimum(first_row + lane, last), gl.minimum(first_row + M + lane, last)
        if HAS_SOURCE:
            upper, lower = gl.load(source + upper), gl.load(source + lower)
        upper_rows = (rows + upper.to(gl.int64) * row_stride)[:, None] + depth
        lower_rows = (rows + lower.to(gl.int64) * row_stride)[:, None] + depth
        of_block = gl.arange(0, B, layout=gl.SliceLayout(1, copy)).to(gl.int64) * weight_stride
        left_rows = (weight + left.to(gl.int64) * B * weight_stride + of_block)[:, None] + depth
        right_rows = (weight + right.to(gl.int64) * B * weight_stride + of_block)[:, None] + depth
        for group in range(groups):
            stage = group % DEPTH
            mbarrier.wait(empty.index(stage), ((group // DEPTH) & 1) ^ 1)
            async_load(a_first.index(stage), upper_rows + group * G)
            async_load(a_second.index(stage), lower_rows + group * G)
            async_load(b_left.index(stage), left_rows + group * G)
            async_load(b_right.index(stage), right_rows + group * G)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)

    @gluon.jit
    def _scale(place, POWERS: gl.constexpr):
        """One fp32 scale: as it stands, or of its exponent."""
        scale = gl.load(place)
        if POWERS:
            bits = scale.to(gl.int32)
            bits = gl.where(bits == 0, 0x400000, gl.where(bits == 255, 0x7FC00000, bits << 23))
            scale = bits.to(gl.float32, bitcast=True)
        return scale

    @gluon.jit
    def _multiply_group(
        a,
        b_left,
        b_right,
        full,
        empty,
        factors,
        source,
        left_scales,
        right_scales,
        groups,
        factor_stride,
        out,
        out_factors,
        place,
        HALF: gl.constexpr,
        GATED: gl.constexpr,
        HAS_SOURCE: gl.constexpr,
        POWERS: gl.constexpr,
        ROUND: gl.constexpr,
    ):
        """M rows by both blocks of weights, and what becomes of the sums."""
        first_row, end, left, right, P, blocks, out_stride = place
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 32])
        of_rows: gl.constexpr = gl.SliceLayout(1, layout)
        row = first_row + HALF * M + gl.arange(0, M, layout=of_rows)
        from_row = gl.minimum(row, gl.maximum(end - 1, 0))
        if HAS_SOURCE:
            from_row = gl.load(source + from_row)
        factor_rows = factors + from_row
        left_sum = gl.zeros([M, B], gl.float32, layout)
        right_sum = gl.zeros([M, B], gl.float32, layout)
        product = gl.zeros([M, B], gl.float32, layout)
        factor = gl.load(factor_rows)
        left_scale, right_scale = _scale(left_scales, POWERS), _scale(right_scales, POWERS)
        for group in range(groups):
            stage = group % DEPTH
            mbarrier.wait(full.index(stage), (group // DEPTH) & 1)
            fence_async_shared()
            rows = a.index(stage)
            product = warpgroup_mma(rows, b_left.index(stage).permute((1, 0)), product, use_acc=False, is_async=True)
            # The next group's, while the matrix units work; of the last the same again.
            ahead = gl.minimum(group + 1, groups - 1)
            next_factor = gl.load(factor_rows + ahead.to(gl.int64) * factor_stride)
            next_left, next_right = _scale(left_scales + ahead, POWERS), _scale(right_scales + ahead, POWERS)
            product = warpgroup_mma_wait(0, deps=[product])
            left_sum += product * (factor * left_scale)[:, None]
            product = warpgroup_mma(rows, b_right.index(stage).permute((1, 0)), product, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=[product])
            barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            right_sum += product * (factor * right_scale)[:, None]
            factor, left_scale, right_scale = next_factor, next_left, next_right

        column = gl.arange(0, B, layout=gl.SliceLayout(0, layout))[None, :]
        places = (out + row.to(gl.int64) * out_stride)[:, None] + left * B + column
        real = (row < end)[:, None] & (column < B)
        if GATED:
            # Rounded where a linear layer and an activation would.
            wide = left_sum.to(ROUND).to(gl.float32)
            wide = (wide / (1.0 + gl.exp(-wide))).to(ROUND).to(gl.float32)
            wide = (wide * right_sum.to(ROUND).to(gl.float32)).to(ROUND).to(gl.float32)
            largest = gl.max(gl.abs(wide), 1)
            scale = gl.where(largest > 0.0, gl.div_rn(largest, 448.0), 1.0)
            scaled = wide * gl.div_rn(1.0, scale)[:, None]
            scaled = gl.where(scaled > 448.0, 448.0, gl.where(scaled < -448.0, -448.0, scaled))
            gl.store(places, scaled.to(out.dtype.element_ty), mask=real)
            gl.store(out_factors + left.to(gl.int64) * P + row, scale, mask=row < end)
        else:
            gl.store(places, left_sum.to(out.dtype.element_ty), mask=real)
            # Of an odd number of blocks the last has no neighbour.
            second = real & (right > left)
            gl.store(places + B, right_sum.to(out.dtype.element_ty), mask=second)
