"""Block fp8 weights times a few tokens on e4m3 matrix units: no weight is widened, and tokens come in two e4m3 pieces.

A bf16 value has eight significant bits and e4m3 four: scaled by a power of two for each 128 columns, it is the sum of
two e4m3 values, to 2^-17 of the largest of them. Weights go from memory to the matrix units as they are, as the rows
of a tile, and the products with both pieces are summed before the block's scale meets them.

Legend: T tokens, D hidden width, N outputs, I width of a routed expert, J of the shared expert, K experts a token.
"""

from __future__ import annotations

import torch

from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton
from .block_fp8_activations_triton import as_kernels_read
from .block_fp8_format import is_ue8m0
from .block_fp8_linear_triton import sum_parts_kernel
from .block_fp8_reference import GROUP

# Columns of a tile of products, of which tokens fill some: the least that matrix units take.
TOKENS = 16

Matrix = tuple[torch.Tensor, torch.Tensor]


def linear_in_pieces(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    base: torch.Tensor | None,
    out: torch.Tensor,
    splits: int,
    rows: int = 64,
    warps: int = 4,
    stages: int = 4,
) -> torch.Tensor:
    """`out = base + x W^T` for bf16 `x [T, D]`, T at most `TOKENS`; `splits` programs share the columns of a row."""
    tokens, width = x.shape
    outputs = weight.shape[0]
    powers = is_ue8m0(scales)
    weight, scales = as_kernels_read(weight, scales)
    parts = out
    if splits > 1:
        parts = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
    launcher(block_fp8_pieces_kernel, (triton.cdiv(outputs, rows), splits), x)(
        x,
        weight,
        scales,
        out if base is None else base,
        parts,
        tokens,
        outputs,
        width,
        x.stride(0),
        weight.stride(0),
        scales.stride(0),
        0 if base is None else base.stride(0),
        parts.stride(-2),
        ROWS=rows,
        TOKENS=TOKENS,
        GROUP=GROUP,
        SPLIT=splits > 1,
        WHOLE=width % GROUP == 0,
        POWERS=powers,
        HAS_BASE=base is not None and splits == 1,
        num_warps=warps,
        num_stages=stages,
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


def experts_in_pieces(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    shared: tuple[Matrix, Matrix, Matrix] | None,
    base: torch.Tensor | None,
    out: torch.Tensor | None = None,
    up_options: tuple[int, int, int] = (64, 4, 4),
    down_options: tuple[int, int, int] = (64, 4, 4),
) -> torch.Tensor:
    """Arguments and results as `block_fp8_vector_triton.block_fp8_experts_vector`, for bf16."""
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
    common = {"TOKENS": TOKENS, "GROUP": GROUP, "POWERS": powers, "K": k, "INNER": inner, "SHARED": shared_inner}
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
        D=width,
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
        D=width,
        ROWS=rows,
        num_warps=warps,
        num_stages=stages,
        **common,
    )
    launcher(sum_expert_parts_kernel, (tokens, triton.cdiv(width, 512)), x)(
        parts,
        weights,
        out if base is None else base,
        out,
        tokens,
        width,
        0 if base is None else base.stride(0),
        K=k,
        HAS_SHARED=has_shared,
        HAS_BASE=base is not None,
        BLOCK=512,
        num_warps=4,
    )
    return out


if triton is not None:
    from .block_fp8_activations_triton import scale_of

    @triton.jit
    def in_pieces(value):
        """Two e4m3 tiles that sum up to fp32 rows `[TOKENS, GROUP]` times a power of two each, and its inverse."""
        # The largest of a row becomes 128 to 256, whose exponent is 134 in fp32.
        exponent = tl.maximum(tl.max(tl.abs(value), 1).to(tl.int32, bitcast=True) >> 23, 16)
        scale = ((261 - exponent) << 23).to(tl.float32, bitcast=True)
        inverse = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
        scaled = value * scale[:, None]
        first = scaled.to(tl.float8e4nv)
        second = (scaled - first.to(tl.float32)).to(tl.float8e4nv)
        return first, second, inverse

    @triton.jit
    def products_in_pieces(tile, first, second):
        """`[ROWS, TOKENS]` sums of an e4m3 tile `[ROWS, GROUP]` with both pieces `[TOKENS, GROUP]`."""
        return tl.dot(tile, tl.trans(second), acc=tl.dot(tile, tl.trans(first)))

    @triton.jit(do_not_specialize=["T"])
    def block_fp8_pieces_kernel(
        x,
        weight,
        scales,
        base,
        out,
        T,
        N,
        D,
        x_stride,
        weight_stride,
        scale_stride,
        base_stride,
        out_stride,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        GROUP: tl.constexpr,
        SPLIT: tl.constexpr,
        WHOLE: tl.constexpr,
        POWERS: tl.constexpr,
        HAS_BASE: tl.constexpr,
    ):
        """ROWS outputs of all tokens; with SPLIT one part of their sums, as fp32 `[parts, T, N]`."""
        tile = tl.program_id(0)
        split = tl.program_id(1)
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        token = tl.arange(0, TOKENS)
        from_row = tl.minimum(row, N - 1)
        depth = tl.arange(0, GROUP)
        weights = weight + from_row[:, None] * weight_stride + depth[None, :]
        rows = x + token[:, None] * x_stride + depth[None, :]
        grid = scales + (tile * ROWS // GROUP) * scale_stride
        groups = tl.cdiv(D, GROUP)
        splits = tl.num_programs(1)
        begin, end = split * groups // splits, (split + 1) * groups // splits
        real = (token < T)[:, None]
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for group in range(begin, end):
            if WHOLE:
                a = tl.load(weights + group * GROUP)
                value = tl.load(rows + group * GROUP, mask=real, other=0.0)
            else:
                inside = (group * GROUP + depth < D)[None, :]
                a = tl.load(weights + group * GROUP, mask=inside, other=0.0)
                value = tl.load(rows + group * GROUP, mask=real & inside, other=0.0)
            scale = scale_of(grid + group, group < groups, POWERS)
            first, second, inverse = in_pieces(value.to(tl.float32))
            acc += products_in_pieces(a, first, second) * (inverse * scale)[None, :]
        mask = (row < N)[:, None] & (token < T)[None, :]
        if SPLIT:
            out += split.to(tl.int64) * T * N
        value = acc.to(out.dtype.element_ty)
        if HAS_BASE:
            before = tl.load(base + token[None, :] * base_stride + row[:, None], mask=mask, other=0.0)
            value = (value.to(tl.float32) + before.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + token[None, :] * out_stride + row[:, None], value, mask=mask)

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
    ):
        """`silu(gate x) * (up x)`: one program makes ROWS entries of one token's routed or shared expert."""
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

    @triton.jit
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
    ):
        """ROWS entries of what one expert makes of one token: fp32 `parts [K + shared, T, D]`."""
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
        D,
        base_stride,
        K: tl.constexpr,
        HAS_SHARED: tl.constexpr,
        HAS_BASE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """`base +` the weighted sum of `parts [K, T, D]`, and of the shared expert's after them."""
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
