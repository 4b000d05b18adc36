"""A mixture's experts with block fp8 weights for a few tokens, which come in two e4m3 pieces: no weight is widened.

As `block_fp8_pieces_triton`, with one token in a tile: few tokens rarely share an expert. The first kernel makes
`silu(gate x) * (up x)`, the second every expert's output, which a third one weights and adds up.

Legend: T tokens, D hidden width, I width of a routed expert, J of the shared expert, K experts a token.
"""

from __future__ import annotations

from typing import Any

import torch

from ..common.early_launch import early_launch
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton
from .block_fp8_activations_triton import as_kernels_read
from .block_fp8_format import is_ue8m0
from .block_fp8_pieces_triton import SUMMED, TOKENS
from .block_fp8_reference import GROUP
from .block_fp8_vector_triton import Matrix

# Rows, warps and stages of both products, as measured on H200 at DeepSeek-V3.2's shapes.
UP, DOWN = (64, 4, 3), (128, 8, 4)


def experts_in_pieces(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    shared: tuple[Matrix, Matrix, Matrix] | None,
    base: torch.Tensor | None,
    out: torch.Tensor | None = None,
    up_options: tuple[int, int, int] = UP,
    down_options: tuple[int, int, int] = DOWN,
) -> torch.Tensor:
    """Arguments and results as `block_fp8_vector_triton.block_fp8_experts_vector`, for bf16.

    Rows of the shared expert's gate and up must be as far apart.
    """
    tokens, width = x.shape
    inner, k = down[0].shape[2], experts.shape[1]
    powers = is_ue8m0(down[1])
    gate_up, down = as_kernels_read(*gate_up), as_kernels_read(*down)
    gate, up, shared_down = gate_up, gate_up, down
    shared_inner = 0
    if shared is not None:
        gate, up, shared_down = (as_kernels_read(*matrix) for matrix in shared)
        shared_inner = gate[0].shape[0]
    hidden = torch.empty(tokens, k * inner + shared_inner, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, width, dtype=x.dtype, device=x.device) if out is None else out
    if tokens == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, warps, stages = up_options
    tiles, shared_tiles = triton.cdiv(inner, rows), triton.cdiv(shared_inner, rows)
    common: dict[str, Any] = {"TOKENS": TOKENS, "GROUP": GROUP, "POWERS": powers, "K": k, "D": width}
    common |= {"INNER": inner, "SHARED": shared_inner, **early_launch()}
    launcher(block_fp8_experts_up_pieces_kernel, (k * tiles + shared_tiles, tokens), x)(
        x,
        experts,
        *gate_up,
        *gate,
        *up,
        hidden,
        x.stride(0),
        *gate_up[0].stride()[:2],
        gate[0].stride(-2),
        ROWS=rows,
        num_warps=warps,
        num_stages=stages,
        **common,
    )
    rows, warps, stages = down_options
    has_shared = shared is not None
    parts = torch.empty(k + has_shared, tokens, width, dtype=torch.float32, device=x.device)
    launcher(block_fp8_experts_down_pieces_kernel, (triton.cdiv(width, rows), k + has_shared, tokens), x)(
        hidden,
        experts,
        *down,
        *shared_down,
        parts,
        tokens,
        *down[0].stride()[:2],
        shared_down[0].stride(-2),
        ROWS=rows,
        num_warps=warps,
        num_stages=stages,
        **common,
    )
    launcher(sum_expert_parts_kernel, (tokens, triton.cdiv(width, SUMMED)), x)(
        parts,
        weights,
        out if base is None else base,
        out,
        tokens,
        0 if base is None else base.stride(0),
        D=width,
        K=k,
        HAS_SHARED=has_shared,
        HAS_BASE=base is not None,
        BLOCK=SUMMED,
        num_warps=4,
        **early_launch(),
    )
    return out


if triton is not None:
    from ..common.early_launch import wait_for_kernels_ahead
    from .block_fp8_activations_triton import scale_of
    from .block_fp8_pieces_triton import in_pieces, products_in_pieces

    @triton.jit
    def block_fp8_experts_up_pieces_kernel(
        x,
        experts,
        gate_up,
        gate_up_scales,
        gate,
        gate_scales,
        up,
        up_scales,
        hidden,
        x_stride,
        expert_stride,
        row_stride,
        shared_stride,
        D: tl.constexpr,
        INNER: tl.constexpr,
        SHARED: tl.constexpr,
        K: tl.constexpr,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        GROUP: tl.constexpr,
        POWERS: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """`silu(gate x) * (up x)`: one program makes ROWS entries of one token's routed or shared expert."""
        wait_for_kernels_ahead(EARLY)
        token = tl.program_id(1).to(tl.int64)
        TILES: tl.constexpr = (INNER + ROWS - 1) // ROWS
        SHARED_TILES: tl.constexpr = (SHARED + ROWS - 1) // ROWS
        GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
        HALF: tl.constexpr = (INNER + GROUP - 1) // GROUP * GROUPS
        tile = tl.program_id(0) - SHARED_TILES
        part = K
        if tile >= 0:
            part = tile // TILES
            first_row = tile % TILES * ROWS
            size = INNER
            expert = tl.load(experts + token * K + part)
            gates = gate_up + expert * expert_stride
            ups = gates + INNER * row_stride
            stride = row_stride
            gate_grid = gate_up_scales + expert * (2 * HALF) + first_row // GROUP * GROUPS
            up_grid = gate_grid + HALF
        else:
            first_row = tl.program_id(0) * ROWS
            size = SHARED
            gates, ups, stride = gate, up, shared_stride
            gate_grid = gate_scales + (first_row // GROUP * GROUPS).to(tl.int64)
            up_grid = up_scales + (first_row // GROUP * GROUPS).to(tl.int64)
        depth = tl.arange(0, GROUP)
        column = tl.arange(0, TOKENS)
        only = (column < 1)[:, None]
        row = first_row + tl.arange(0, ROWS)
        from_row = tl.minimum(row, size - 1).to(tl.int64)
        gates += from_row[:, None] * stride + depth[None, :]
        ups += from_row[:, None] * stride + depth[None, :]
        # All columns of the tile read this token, and the first one's products are kept.
        rows = x + token * x_stride + column[:, None] * 0 + depth[None, :]
        gate_sum = tl.zeros([ROWS, TOKENS], tl.float32)
        up_sum = tl.zeros([ROWS, TOKENS], tl.float32)
        for group in range(GROUPS):
            if D % GROUP == 0:
                g = tl.load(gates + group * GROUP)
                u = tl.load(ups + group * GROUP)
                value = tl.load(rows + group * GROUP, mask=only, other=0.0)
            else:
                inside = (group * GROUP + depth < D)[None, :]
                g = tl.load(gates + group * GROUP, mask=inside, other=0.0)
                u = tl.load(ups + group * GROUP, mask=inside, other=0.0)
                value = tl.load(rows + group * GROUP, mask=only & inside, other=0.0)
            gate_scale = scale_of(gate_grid + group, group < GROUPS, POWERS)
            up_scale = scale_of(up_grid + group, group < GROUPS, POWERS)
            first, second, inverse = in_pieces(value.to(tl.float32))
            gate_sum += products_in_pieces(g, first, second) * (inverse * gate_scale)[None, :]
            up_sum += products_in_pieces(u, first, second) * (inverse * up_scale)[None, :]
        dtype = hidden.dtype.element_ty
        # Rounded where a linear layer and an activation would.
        wide = gate_sum.to(dtype).to(tl.float32)
        value = (wide * tl.sigmoid(wide)).to(dtype).to(tl.float32) * up_sum.to(dtype).to(tl.float32)
        places = hidden + token * (K * INNER + SHARED) + part * INNER + row[:, None] + column[None, :] * 0
        tl.store(places, value.to(dtype), mask=(row < size)[:, None] & (column < 1)[None, :])

    @triton.jit(do_not_specialize=["T"])
    def block_fp8_experts_down_pieces_kernel(
        hidden,
        experts,
        down,
        down_scales,
        shared_down,
        shared_scales,
        parts,
        T,
        expert_stride,
        row_stride,
        shared_stride,
        D: tl.constexpr,
        INNER: tl.constexpr,
        SHARED: tl.constexpr,
        K: tl.constexpr,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        GROUP: tl.constexpr,
        POWERS: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """ROWS entries of what one expert makes of one token: fp32 `parts [K + shared, T, D]`."""
        wait_for_kernels_ahead(EARLY)
        first_row = tl.program_id(0) * ROWS
        part = tl.program_id(1)
        token = tl.program_id(2).to(tl.int64)
        row = first_row + tl.arange(0, ROWS)
        ROW_GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
        GROUPS: tl.constexpr = (INNER + GROUP - 1) // GROUP
        SHARED_GROUPS: tl.constexpr = (SHARED + GROUP - 1) // GROUP
        if part < K:
            expert = tl.load(experts + token * K + part)
            weights = down + expert * expert_stride
            stride = row_stride
            grid = down_scales + expert * (ROW_GROUPS * GROUPS) + first_row // GROUP * GROUPS
            groups = GROUPS
            size = INNER
        else:
            weights = shared_down
            stride = shared_stride
            grid = shared_scales + (first_row // GROUP * SHARED_GROUPS).to(tl.int64)
            groups = SHARED_GROUPS
            size = SHARED
        depth = tl.arange(0, GROUP)
        column = tl.arange(0, TOKENS)
        only = (column < 1)[:, None]
        from_row = tl.minimum(row, D - 1).to(tl.int64)
        weights += from_row[:, None] * stride + depth[None, :]
        rows = hidden + token * (K * INNER + SHARED) + part * INNER + column[:, None] * 0 + depth[None, :]
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for group in range(groups):
            if INNER % GROUP == 0 and SHARED % GROUP == 0:
                a = tl.load(weights + group * GROUP)
                value = tl.load(rows + group * GROUP, mask=only, other=0.0)
            else:
                inside = (group * GROUP + depth < size)[None, :]
                a = tl.load(weights + group * GROUP, mask=inside, other=0.0)
                value = tl.load(rows + group * GROUP, mask=only & inside, other=0.0)
            scale = scale_of(grid + group, group < groups, POWERS)
            first, second, inverse = in_pieces(value.to(tl.float32))
            acc += products_in_pieces(a, first, second) * (inverse * scale)[None, :]
        places = parts + (part * T.to(tl.int64) + token) * D + row[:, None] + column[None, :] * 0
        tl.store(places, acc, mask=(row < D)[:, None] & (column < 1)[None, :])

    @triton.jit(do_not_specialize=["T"])
    def sum_expert_parts_kernel(
        parts,
        weights,
        base,
        out,
        T,
        base_stride,
        D: tl.constexpr,
        K: tl.constexpr,
        HAS_SHARED: tl.constexpr,
        HAS_BASE: tl.constexpr,
        BLOCK: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """`base +` the weighted sum of `parts [K, T, D]`, and of the shared expert's after them."""
        wait_for_kernels_ahead(EARLY)
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < D
        dtype = out.dtype.element_ty
        total = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(K):
            made = tl.load(parts + (part * T.to(tl.int64) + token) * D + column, mask=inside, other=0.0)
            total += made.to(dtype).to(tl.float32) * tl.load(weights + token * K + part)
        total = total.to(dtype).to(tl.float32)
        if HAS_SHARED:
            made = tl.load(parts + (K * T.to(tl.int64) + token) * D + column, mask=inside, other=0.0)
            total += made.to(dtype).to(tl.float32)
        if HAS_BASE:
            total += tl.load(base + token * base_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * D + column, total.to(dtype), mask=inside)
