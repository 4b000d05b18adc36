"""The passes of a mixture of experts in Triton: two matrix-vector kernels for a few tokens, and for many tokens what
stands around grouped matmuls: copying rows to their experts, the gate, and the weighted sum back by token.

Legend: D hidden width, I width of a routed expert, J width of the shared expert, K experts per token.
"""

from __future__ import annotations

import torch

from ..common.early_launch import early_launch, wait_for_kernels_ahead
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton

# Output rows of a program, and input columns that it holds at once, in the matrix-vector kernels.
VECTOR_ROWS, VECTOR_COLUMNS = 4, 2048
# Entries of rows that four warps hold at once, and a tile of the gate.
ROW_TILE, GATED_ROWS, GATED_COLUMNS = 4096, 4, 1024


def experts_vector(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    base: torch.Tensor | None,
) -> torch.Tensor:
    """A few tokens through their experts, reading each chosen expert's weights once per token.

    Arguments and result as `kernels.routed_experts.routed_experts`, with `base` for its `accumulate`.
    """
    tokens, width = x.shape
    inner, k = down.shape[2], experts.shape[1]
    gate, up, shared_down = shared if shared is not None else (gate_up, gate_up, down)
    shared_inner = gate.shape[0] if shared is not None else 0
    hidden = torch.empty(tokens, k * inner + shared_inner, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, width, dtype=x.dtype, device=x.device) if base is None else base
    if tokens == 0:
        return out
    tiles, shared_tiles = triton.cdiv(inner, VECTOR_ROWS), triton.cdiv(shared_inner, VECTOR_ROWS)
    tensors = (x, experts, gate_up, gate, up, hidden)
    strides = (x.stride(0), *gate_up.stride()[:2], gate.stride(0), up.stride(0))
    launcher(experts_up_vector_kernel, (tokens, k * tiles + shared_tiles), x)(
        *tensors,
        *strides,
        D=width,
        INNER=inner,
        SHARED=shared_inner,
        K=k,
        ROWS=VECTOR_ROWS,
        COLUMNS=min(VECTOR_COLUMNS, triton.next_power_of_2(width)),
        num_warps=4,
        **early_launch(),
    )
    more = (hidden, experts, weights, down, shared_down, out if base is None else base, out)
    strides = (*down.stride()[:2], shared_down.stride(-2), 0 if base is None else base.stride(0))
    launcher(experts_down_vector_kernel, (tokens, triton.cdiv(width, VECTOR_ROWS)), hidden)(
        *more,
        *strides,
        D=width,
        INNER=inner,
        SHARED=shared_inner,
        K=k,
        ROWS=VECTOR_ROWS,
        COLUMNS=min(VECTOR_COLUMNS, triton.next_power_of_2(inner)),
        HAS_BASE=base is not None,
        num_warps=4,
        **early_launch(),
    )
    return out


def copy_rows(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Each row of `x [T, D]` at its places, a permutation int64 `[T, K]` of 0 .. T K - 1: `[T K, D]`."""
    tokens, k = place.shape
    out = torch.empty(tokens * k, x.shape[1], dtype=x.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(x.shape[1])
        rows = max(1, ROW_TILE // block)
        grid = (triton.cdiv(tokens, rows),)
        tensors = (x, place, out)
        sizes = (x.shape[1], block, k, rows)
        launcher(copy_rows_kernel, grid, x)(*tensors, tokens, x.stride(0), *sizes, num_warps=4)
    return out


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `[N, I]` tensors with contiguous rows (halves of one tensor, say)."""
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    if out.numel():
        block = min(GATED_COLUMNS, triton.next_power_of_2(width))
        grid = (triton.cdiv(rows, GATED_ROWS), triton.cdiv(width, block))
        tensors = (gate, up, out)
        sizes = (width, block, GATED_ROWS)
        launcher(gated_kernel, grid, gate)(*tensors, rows, gate.stride(0), up.stride(0), *sizes, num_warps=4)
    return out


def combine(
    routed: torch.Tensor,
    place: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    base: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`out[t] = base[t] + shared[t] + sum_j weights[t, j] * routed[place[t, j]]`, summed in fp32.

    Args:
        routed: `[T * K, D]`, rows in the experts' order.
        place: int64 `[T, K]`, where each token's rows stand in it.
        weights: fp32 `[T, K]`.
        shared: `[T, D]` or None.
        base: `[T, D]`, may be `out`, or None.
        out: `[T, D]`, written.
    """
    tokens, width = out.shape
    if out.numel():
        block = triton.next_power_of_2(width)
        tensors = (routed, place, weights, out if shared is None else shared, out if base is None else base, out)
        strides = (0 if shared is None else shared.stride(0), 0 if base is None else base.stride(0), out.stride(0))
        launcher(combine_kernel, (tokens,), routed)(
            *tensors,
            *strides,
            D=width,
            BLOCK=block,
            K=weights.shape[1],
            HAS_SHARED=shared is not None,
            HAS_BASE=base is not None,
            num_warps=4 if block <= ROW_TILE else 8,
        )


if triton is not None:

    @triton.jit
    def experts_up_vector_kernel(
        x,
        experts,
        gate_up,
        gate,
        up,
        hidden,
        x_stride,
        expert_stride,
        row_stride,
        gate_stride,
        up_stride,
        D: tl.constexpr,
        INNER: tl.constexpr,
        SHARED: tl.constexpr,
        K: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """`silu(gate x) * (up x)`: one program makes ROWS entries of one token's routed or shared expert."""
        token = tl.program_id(0).to(tl.int64)
        TILES: tl.constexpr = (INNER + ROWS - 1) // ROWS
        SHARED_TILES: tl.constexpr = (SHARED + ROWS - 1) // ROWS
        # Ahead of the routed experts' tiles come the shared expert's, which need not wait to know the experts.
        tile = tl.program_id(1) - SHARED_TILES
        part = K
        column = tl.arange(0, COLUMNS)
        if tile >= 0:
            if EARLY:
                tl.extra.cuda.gdc_wait()
            part = tile // TILES
            row = tile % TILES * ROWS + tl.arange(0, ROWS)
            real = row < INNER
            expert = tl.load(experts + token * K + part)
            gate_rows = gate_up + expert * expert_stride + row * row_stride
            up_rows = gate_rows + INNER * row_stride
        else:
            row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
            real = row < SHARED
            gate_rows = gate + row.to(tl.int64) * gate_stride
            up_rows = up + row.to(tl.int64) * up_stride
        gate_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
        up_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in tl.static_range(0, D, COLUMNS):
            inside = first + column < D
            mask = real[:, None] & inside[None, :]
            gate_tile = tl.load(gate_rows[:, None] + first + column[None, :], mask=mask, other=0.0)
            up_tile = tl.load(up_rows[:, None] + first + column[None, :], mask=mask, other=0.0)
            if first == 0:
                wait_for_kernels_ahead(EARLY)
            value = tl.load(x + token * x_stride + first + column, mask=inside, other=0.0).to(tl.float32)
            gate_sum += gate_tile.to(tl.float32) * value[None, :]
            up_sum += up_tile.to(tl.float32) * value[None, :]
        dtype = hidden.dtype.element_ty
        # Rounded where a linear layer and an activation would.
        g = tl.sum(gate_sum, 1).to(dtype).to(tl.float32)
        u = tl.sum(up_sum, 1).to(dtype).to(tl.float32)
        value = (g * tl.sigmoid(g)).to(dtype).to(tl.float32) * u
        tl.store(hidden + token * (K * INNER + SHARED) + part * INNER + row, value.to(dtype), mask=real)

    @triton.jit
    def _products(rows, vector, at: tl.constexpr, real, column, WIDTH: tl.constexpr):
        """Of rows of a weight and WIDTH entries of a vector from `at` on: `[rows, columns]`, to be summed by row."""
        acc = tl.zeros([rows.shape[0], column.shape[0]], tl.float32)
        for first in tl.static_range(0, WIDTH, column.shape[0]):
            inside = first + column < WIDTH
            value = tl.load(vector + at + first + column, mask=inside, other=0.0).to(tl.float32)
            tile = tl.load(rows[:, None] + first + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            acc += tile.to(tl.float32) * value[None, :]
        return acc

    @triton.jit
    def experts_down_vector_kernel(
        hidden,
        experts,
        weights,
        down,
        shared_down,
        base,
        out,
        expert_stride,
        row_stride,
        shared_stride,
        base_stride,
        D: tl.constexpr,
        INNER: tl.constexpr,
        SHARED: tl.constexpr,
        K: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        HAS_BASE: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """ROWS entries of one token's sum over its experts."""
        token = tl.program_id(0).to(tl.int64)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        real = row < D
        column = tl.arange(0, COLUMNS)
        dtype = out.dtype.element_ty
        hidden += token * (K * INNER + SHARED)
        total = tl.zeros([ROWS], tl.float32)
        wait_for_kernels_ahead(EARLY)
        for part in tl.static_range(K):
            expert = tl.load(experts + token * K + part)
            rows = down + expert * expert_stride + row * row_stride
            acc = _products(rows, hidden, part * INNER, real, column, INNER)
            total += tl.sum(acc, 1).to(dtype).to(tl.float32) * tl.load(weights + token * K + part)
        total = total.to(dtype).to(tl.float32)
        if SHARED > 0:
            rows = shared_down + row.to(tl.int64) * shared_stride
            acc = _products(rows, hidden, K * INNER, real, column, SHARED)
            total += tl.sum(acc, 1).to(dtype).to(tl.float32)
        if HAS_BASE:
            total += tl.load(base + token * base_stride + row, mask=real, other=0.0).to(tl.float32)
        tl.store(out + token * D + row, total.to(dtype), mask=real)

    @triton.jit(do_not_specialize=["tokens"])
    def copy_rows_kernel(
        x, place, out, tokens, x_stride, D: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr
    ):
        """`out[place[t, j]] = x[t]`: a row is read once for all its experts."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        mask = (row < tokens)[:, None] & (column < D)[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask)
        for j in tl.static_range(K):
            target = tl.load(place + row * K + j, mask=row < tokens, other=0)
            tl.store(out + target[:, None] * D + column[None, :], value, mask=mask)

    @triton.jit(do_not_specialize=["num_rows"])
    def gated_kernel(
        gate, up, out, num_rows, gate_stride, up_stride, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
    ):
        """`out = silu(gate) * up`."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = (row < num_rows)[:, None] & (column < D)[None, :]
        g = tl.load(gate + row[:, None] * gate_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + row[:, None] * up_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dtype = out.dtype.element_ty
        value = (g * tl.sigmoid(g)).to(dtype).to(tl.float32) * u
        tl.store(out + row[:, None] * D + column[None, :], value.to(dtype), mask=mask)

    @triton.jit
    def combine_kernel(
        routed,
        place,
        weights,
        shared,
        base,
        out,
        shared_stride,
        base_stride,
        out_stride,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        K: tl.constexpr,
        HAS_SHARED: tl.constexpr,
        HAS_BASE: tl.constexpr,
    ):
        """One token's weighted sum over its experts' rows."""
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < D
        total = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(K):
            row = tl.load(place + token * K + j)
            weight = tl.load(weights + token * K + j)
            total += tl.load(routed + row * D + column, mask=inside, other=0.0).to(tl.float32) * weight
        if HAS_SHARED:
            total += tl.load(shared + token * shared_stride + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BASE:
            total += tl.load(base + token * base_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=inside)
