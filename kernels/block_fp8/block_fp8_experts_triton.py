"""Grouped products of a mixture's experts with block fp8 weights in Triton: gate, up and activation in one kernel.

Pairs of a token and one of its experts stand in the experts' order (`group_by_expert`). A program makes a tile of rows
of one expert; which one, and where its rows are, a small kernel says beforehand: nothing waits for the device. Rows of
activations are read where their tokens are. Of quantised activations the first kernel quantises what it makes, too.

Legend: T tokens, K experts a token, P = T K pairs, E experts, D hidden width, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton
from .block_fp8_activations_triton import as_kernels_read
from .block_fp8_experts_hopper_gluon import TILE_ROWS, grouped_product_hopper
from .block_fp8_format import E4M3, is_ue8m0
from .block_fp8_linear_triton import Tiles, is_roomy
from .block_fp8_reference import GROUP

# Tiles that one program finds the experts of.
TILES = 32
# Row tiles that go through the columns together: those of one expert read its weights at about the same time, and
# memory is read once.
BAND = 8

Matrix = tuple[torch.Tensor, torch.Tensor]


def expert_tiles(pairs: int, experts: int, quantised: bool, roomy: bool) -> tuple[Tiles, Tiles]:
    """Tiles of the first and second product: rows as many as an expert has on average, or some more."""
    average = pairs / experts
    if not quantised:
        rows = 16 if average <= 16 else 32 if average <= 48 else 64
        # Two sums of 64 x 64, and weights on their way to bf16, would not fit into the registers.
        columns = 32 if rows == 64 else 64
        return Tiles(rows, columns, 4, 3 if roomy else 2), Tiles(rows, 64, 4, 4 if roomy else 3)
    rows = 64 if average <= 192 or not roomy else 128
    stages = (4 if rows == 64 else 3) if roomy else 2
    return Tiles(rows, GROUP, 8, stages), Tiles(rows, GROUP, rows // 16, 4 if roomy else 3)


def grouped_experts(
    x: torch.Tensor,
    activations: tuple[torch.Tensor, torch.Tensor | None],
    place: torch.Tensor,
    ends: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    tiles_of: Callable[[int, int, bool, bool], tuple[Tiles, Tiles]] = expert_tiles,
    hopper: bool = False,
) -> torch.Tensor:
    """Every pair's expert applied to its token, `[P, D]` in the experts' order.

    Args:
        x: `[T, D]`, half precision.
        activations: what is multiplied: `x` quantised, e4m3 `[T, D]` and factors `[T, groups]`; or `x` and None, and
            weights are widened to its dtype.
        place: int64 `[T, K]`, where each pair stands in the experts' order.
        ends: int32 `[E]`, where each expert's pairs end.
        gate_up: `[E, 2 I, D]` and its scales, of the gate's blocks above those of up.
        down: `[E, D, I]` and its scales.
        tiles_of: chooses the tiles, as `expert_tiles` does.
        hopper: let quantised activations go through `block_fp8_experts_hopper_gluon`, which must take the widths.
    """
    (tokens, width), k = x.shape, place.shape[1]
    count, _, inner = down[0].shape
    pairs, device = tokens * k, x.device
    rows, factors = activations
    quantises, powers = factors is not None, is_ue8m0(down[1])
    gate_up, down = as_kernels_read(*gate_up), as_kernels_read(*down)
    first_tiles, second_tiles = tiles_of(pairs, count, quantises, is_roomy(device))
    routed = torch.empty(pairs, width, dtype=x.dtype, device=device)
    if pairs == 0:
        return routed
    source = torch.empty(pairs, dtype=torch.int32, device=device)
    of_token = torch.arange(tokens, dtype=torch.int32, device=device).repeat_interleave(k, output_size=pairs)
    source.scatter_(0, place.reshape(-1), of_token)
    hidden = torch.empty(pairs, inner, dtype=E4M3 if quantises else x.dtype, device=device)
    groups = triton.cdiv(inner, GROUP)
    hidden_factors = torch.empty(groups, pairs, dtype=torch.float32, device=device) if quantises else None
    if hopper and factors is not None and hidden_factors is not None:
        tiles, _ = tile_map(ends, pairs, TILE_ROWS)
        options = {"powers": powers, "rounded": dtype_of(x), "band": BAND}
        grouped_product_hopper(rows, factors, source, tiles, *gate_up, hidden, hidden_factors, **options)
        grouped_product_hopper(hidden, hidden_factors.t(), None, tiles, *down, routed, None, **options)
        return routed
    tiles, most = tile_map(ends, pairs, first_tiles.rows)
    common: dict[str, Any] = {"E": count, "GROUP": GROUP, "BAND": BAND, "QUANTISED": quantises, "POWERS": powers}
    launcher(block_fp8_experts_up_kernel, (triton.cdiv(inner, first_tiles.columns) * most,), x)(
        rows,
        rows if factors is None else factors,
        source,
        tiles,
        *gate_up,
        hidden,
        hidden if hidden_factors is None else hidden_factors,
        pairs,
        width,
        inner,
        rows.stride(0),
        0 if factors is None else factors.stride(1),
        *gate_up[0].stride()[:2],
        hidden.stride(0),
        ROWS=first_tiles.rows,
        COLUMNS=first_tiles.columns,
        WHOLE=width % GROUP == 0 and inner % first_tiles.columns == 0,
        ROUND=dtype_of(x),
        num_warps=first_tiles.warps,
        num_stages=first_tiles.stages,
        **common,
    )
    launcher(block_fp8_experts_down_kernel, (triton.cdiv(width, second_tiles.columns) * most,), x)(
        hidden,
        hidden if hidden_factors is None else hidden_factors,
        tiles,
        *down,
        routed,
        pairs,
        width,
        inner,
        *down[0].stride()[:2],
        hidden.stride(0),
        routed.stride(0),
        ROWS=second_tiles.rows,
        COLUMNS=second_tiles.columns,
        WHOLE=inner % GROUP == 0,
        num_warps=second_tiles.warps,
        num_stages=second_tiles.stages,
        **common,
    )
    return routed


def dtype_of(x: torch.Tensor) -> Any:
    """Triton's name of a half-precision dtype."""
    return tl.float16 if x.dtype == torch.float16 else tl.bfloat16


def tile_map(ends: torch.Tensor, pairs: int, rows: int) -> tuple[torch.Tensor, int]:
    """Tiles of `rows` rows, none with rows of two experts, and how many there are at most.

    Returns:
        int32 `[3, most]`: a tile's expert, E where there is no such tile, its first row and where the expert's end.
    """
    count = ends.shape[0]
    most = triton.cdiv(pairs, rows) + min(count, pairs)
    tiles = torch.empty(3, most, dtype=torch.int32, device=ends.device)
    launcher(expert_tiles_kernel, (triton.cdiv(most, TILES),), ends)(
        ends, tiles, most, E=count, EP=max(16, triton.next_power_of_2(count)), ROWS=rows, TILES=TILES, num_warps=4
    )
    return tiles, most


if triton is not None:
    from .block_fp8_activations_triton import quantised, scale_of, widened

    @triton.jit(do_not_specialize=["most"])
    def expert_tiles_kernel(
        ends, tiles, most, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr
    ):
        """Which expert's rows TILES tiles have."""
        expert = tl.arange(0, EP)
        end = tl.load(ends + expert, mask=expert < E, other=0)
        start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < E), other=0)
        count = tl.where(expert < E, (end - start + ROWS - 1) // ROWS, 0)
        last = tl.cumsum(count, 0)
        tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
        before = (last[None, :] <= tile[:, None]) & (expert < E)[None, :]  # [TILES, EP]
        found = tl.sum(before.to(tl.int32), 1)
        first_tile = tl.sum(tl.where(before, count[None, :], 0), 1)
        first_row = tl.max(tl.where(before, end[None, :], 0), 1) + (tile - first_tile) * ROWS
        chosen = expert[None, :] == found[:, None]
        inside = tile < most
        tl.store(tiles + tile, found, mask=inside)
        tl.store(tiles + most + tile, first_row, mask=inside)
        tl.store(tiles + 2 * most + tile, tl.sum(tl.where(chosen, end[None, :], 0), 1), mask=inside)

    @triton.jit
    def place_in_band(column_tiles, BAND: tl.constexpr):
        """A program's tile of rows and of columns, and how many tiles of rows there may be."""
        most = tl.num_programs(0) // column_tiles
        first = tl.program_id(0) // (BAND * column_tiles) * BAND
        inside = tl.program_id(0) - first * column_tiles
        together = tl.minimum(most - first, BAND)
        return first + inside % together, inside // together, most

    @triton.jit(do_not_specialize=["P"])
    def block_fp8_experts_up_kernel(
        x,
        factors,
        source,
        tiles,
        gate_up,
        scales,
        hidden,
        hidden_factors,
        P,
        D,
        inner,
        x_stride,
        factor_stride,
        expert_stride,
        row_stride,
        hidden_stride,
        E: tl.constexpr,
        BAND: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        GROUP: tl.constexpr,
        QUANTISED: tl.constexpr,
        POWERS: tl.constexpr,
        WHOLE: tl.constexpr,
        ROUND: tl.constexpr,
    ):
        """`silu(gate x) * (up x)` of ROWS pairs of one expert, COLUMNS of inner; quantised by GROUP of them."""
        tile, column_tile, most = place_in_band(tl.cdiv(inner, COLUMNS), BAND)
        expert = tl.load(tiles + tile)
        if expert >= E:
            return
        row = tl.load(tiles + most + tile) + tl.arange(0, ROWS)
        end = tl.load(tiles + 2 * most + tile)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        token = tl.load(source + tl.minimum(row, end - 1)).to(tl.int64)
        from_column = tl.minimum(column, inner - 1).to(tl.int64)
        depth = tl.arange(0, GROUP)
        rows = x + token[:, None] * x_stride + depth[None, :]
        gates = gate_up + expert.to(tl.int64) * expert_stride + from_column[:, None] * row_stride + depth[None, :]
        ups = gates + inner.to(tl.int64) * row_stride
        groups, half = tl.cdiv(D, GROUP), tl.cdiv(inner, GROUP)
        gate_grid = scales + (expert.to(tl.int64) * 2 * half + column_tile * COLUMNS // GROUP) * groups
        up_grid = gate_grid + half * groups
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for group in range(groups):
            if WHOLE:
                a = tl.load(rows + group * GROUP)
                g = tl.load(gates + group * GROUP)
                u = tl.load(ups + group * GROUP)
            else:
                inside = (group * GROUP + depth < D)[None, :]
                a = tl.load(rows + group * GROUP, mask=inside, other=0.0)
                g = tl.load(gates + group * GROUP, mask=inside, other=0.0)
                u = tl.load(ups + group * GROUP, mask=inside, other=0.0)
            gate_scale = scale_of(gate_grid + group, group < groups, POWERS)
            up_scale = scale_of(up_grid + group, group < groups, POWERS)
            if QUANTISED:
                factor = tl.load(factors + token + group * factor_stride)
                gate += tl.dot(a, tl.trans(g)) * (factor * gate_scale)[:, None]
                up += tl.dot(a, tl.trans(u)) * (factor * up_scale)[:, None]
            else:
                gate += tl.dot(a, tl.trans(widened(g, x.dtype.element_ty))) * gate_scale
                up += tl.dot(a, tl.trans(widened(u, x.dtype.element_ty))) * up_scale
        # Rounded where a linear layer and an activation would.
        wide = gate.to(ROUND).to(tl.float32)
        value = ((wide * tl.sigmoid(wide)).to(ROUND).to(tl.float32) * up.to(ROUND).to(tl.float32)).to(ROUND)
        mask = (row < end)[:, None] & (column < inner)[None, :]
        places = hidden + row.to(tl.int64)[:, None] * hidden_stride + column[None, :]
        if QUANTISED:
            if not WHOLE:
                value = tl.where((column < inner)[None, :], value, 0.0)
            values, scale = quantised(value.to(tl.float32))
            tl.store(places, values, mask=mask)
            tl.store(hidden_factors + column_tile.to(tl.int64) * P + row, scale, mask=row < end)
        else:
            tl.store(places, value, mask=mask)

    @triton.jit(do_not_specialize=["P"])
    def block_fp8_experts_down_kernel(
        hidden,
        factors,
        tiles,
        down,
        scales,
        routed,
        P,
        D,
        inner,
        expert_stride,
        row_stride,
        hidden_stride,
        routed_stride,
        E: tl.constexpr,
        BAND: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        GROUP: tl.constexpr,
        QUANTISED: tl.constexpr,
        POWERS: tl.constexpr,
        WHOLE: tl.constexpr,
    ):
        """Rows of `hidden [P, inner]` times their expert's `down`, COLUMNS of D."""
        tile, column_tile, most = place_in_band(tl.cdiv(D, COLUMNS), BAND)
        expert = tl.load(tiles + tile)
        if expert >= E:
            return
        row = tl.load(tiles + most + tile) + tl.arange(0, ROWS)
        end = tl.load(tiles + 2 * most + tile)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        from_row = tl.minimum(row, end - 1).to(tl.int64)
        from_column = tl.minimum(column, D - 1).to(tl.int64)
        depth = tl.arange(0, GROUP)
        rows = hidden + from_row[:, None] * hidden_stride + depth[None, :]
        weights = down + expert.to(tl.int64) * expert_stride + from_column[:, None] * row_stride + depth[None, :]
        groups = tl.cdiv(inner, GROUP)
        grid = scales + (expert.to(tl.int64) * tl.cdiv(D, GROUP) + column_tile * COLUMNS // GROUP) * groups
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for group in range(groups):
            if WHOLE:
                a = tl.load(rows + group * GROUP)
                b = tl.load(weights + group * GROUP)
            else:
                inside = (group * GROUP + depth < inner)[None, :]
                a = tl.load(rows + group * GROUP, mask=inside, other=0.0)
                b = tl.load(weights + group * GROUP, mask=inside, other=0.0)
            scale = scale_of(grid + group, group < groups, POWERS)
            if QUANTISED:
                factor = tl.load(factors + from_row + group * P.to(tl.int64))
                acc += tl.dot(a, tl.trans(b)) * (factor * scale)[:, None]
            else:
                acc += tl.dot(a, tl.trans(widened(b, hidden.dtype.element_ty))) * scale
        mask = (row < end)[:, None] & (column < D)[None, :]
        places = routed + row.to(tl.int64)[:, None] * routed_stride + column[None, :]
        tl.store(places, acc.to(routed.dtype.element_ty), mask=mask)
