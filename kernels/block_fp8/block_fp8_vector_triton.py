"""Matrix-vector products with block fp8 weights in Triton: linear layers, and the experts of a mixture, of few tokens.

e4m3 is read, widened to fp32 in registers and multiplied there; 8 products are summed in a thread before the block's
scale meets them. Bound by reading the weights once.

Legend: T tokens, D hidden width, N outputs, I width of a routed expert, J of the shared expert, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..common.early_launch import early_launch
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton
from .block_fp8_activations_triton import as_kernels_read
from .block_fp8_format import is_ue8m0
from .block_fp8_reference import GROUP

MAX_WEIGHTS = 4
# Output rows of a program.
ROWS = 8
# Columns that a thread takes at once: activations (16 bytes) and weights (8) lie in the same threads' registers then,
# and so do the scales of their sums. With others they would change places through shared memory, at every step.
RUN = 8

Matrix = tuple[torch.Tensor, torch.Tensor]


def steps(width: int) -> dict[str, int]:
    """Launch options: columns of a step, those that waste least at the end of `width`, and as many threads."""
    # Steps are written out one after the other: of wide rows fewer and larger ones need fewer registers.
    sizes = (8, 4, 2, 1) if width > 8192 else (4, 2, 1)
    warps = min(sizes, key=lambda warps: (-(-width // (32 * RUN * warps)) * warps, -warps))
    return {"ROWS": ROWS, "COLUMNS": 32 * RUN * warps, "RUN": RUN, "GROUP": GROUP, "num_warps": warps}


def block_fp8_vector_linear_triton(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `block_fp8_linear.block_fp8_vector_linear`, for 128 x 128 blocks and one kind of scales."""
    tokens, width = x.shape
    sizes = [weight.shape[0] for weight in weights]
    total = sum(sizes)
    out = torch.empty(tokens, total, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    powers = is_ue8m0(scales[0])
    read = [as_kernels_read(weight, grid) for weight, grid in zip(weights, scales)]
    read += [read[0]] * (MAX_WEIGHTS - len(read))
    sizes += [0] * (MAX_WEIGHTS - len(sizes))
    tiles = sum(triton.cdiv(size, ROWS) for size in sizes)
    launcher(block_fp8_vector_kernel, (tokens, tiles), x)(
        x,
        *(weight for weight, _ in read),
        *(grid for _, grid in read),
        out,
        out if norm is None else norm,
        out if base is None else base,
        eps,
        x.stride(0),
        0 if base is None else base.stride(0),
        *(weight.stride(0) for weight, _ in read),
        D=width,
        N0=sizes[0],
        N1=sizes[1],
        N2=sizes[2],
        N3=sizes[3],
        POWERS=powers,
        HAS_NORM=norm is not None,
        HAS_BASE=base is not None,
        **steps(width),
        **early_launch(),
    )
    return out


def block_fp8_experts_vector(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    shared: tuple[Matrix, Matrix, Matrix] | None,
    base: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A few tokens through their experts, reading each chosen expert's weights once a token.

    Args:
        x: `[T, D]`.
        experts: int64 `[T, K]`.
        weights: fp32 `[T, K]`.
        gate_up: `[E, 2 I, D]` and its scales, of the gate's blocks above those of up.
        down: `[E, D, I]` and its scales.
        shared: `gate [J, D]`, `up [J, D]`, `down [D, J]` of the shared expert with their scales, or None.
        base: `[T, D]` to add, or None.
        out: contiguous `[T, D]` to write, may be `base`; made when None.

    Returns:
        `[T, D]`: `out`.
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
    tiles, shared_tiles = triton.cdiv(inner, ROWS), triton.cdiv(shared_inner, ROWS)
    launcher(block_fp8_experts_up_vector_kernel, (tokens, k * tiles + shared_tiles), x)(
        x,
        experts,
        *gate_up,
        *gate,
        *up,
        hidden,
        x.stride(0),
        *gate_up[0].stride()[:2],
        gate[0].stride(0),
        up[0].stride(0),
        D=width,
        INNER=inner,
        SHARED=shared_inner,
        K=k,
        POWERS=powers,
        **steps(width),
        **early_launch(),
    )
    launcher(block_fp8_experts_down_vector_kernel, (tokens, triton.cdiv(width, ROWS)), hidden)(
        hidden,
        experts,
        weights,
        *down,
        *shared_down,
        out if base is None else base,
        out,
        *down[0].stride()[:2],
        shared_down[0].stride(-2),
        0 if base is None else base.stride(0),
        D=width,
        INNER=inner,
        SHARED=shared_inner,
        K=k,
        POWERS=powers,
        HAS_BASE=base is not None,
        **steps(inner),
        **early_launch(),
    )
    return out


if triton is not None:
    from .block_fp8_activations_triton import scale_of, widened

    @triton.jit
    def _products(tile, value, ROWS: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):
        """Sums of RUN products of an e4m3 tile `[ROWS, RUNS * RUN]` with fp32 `[RUNS * RUN]`: `[ROWS, RUNS]`."""
        products = widened(tile, tl.float32) * value[None, :]
        return tl.sum(tl.reshape(products, [ROWS, RUNS, RUN]), 2)

    @triton.jit
    def block_fp8_vector_kernel(
        x,
        weight0,
        weight1,
        weight2,
        weight3,
        scales0,
        scales1,
        scales2,
        scales3,
        out,
        norm,
        base,
        eps,
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
        RUN: tl.constexpr,
        GROUP: tl.constexpr,
        POWERS: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_BASE: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """ROWS outputs of one token; the second grid axis counts the tiles of all weights."""
        token = tl.program_id(0).to(tl.int64)
        tile = tl.program_id(1)
        END0: tl.constexpr = (N0 + ROWS - 1) // ROWS
        END1: tl.constexpr = END0 + (N1 + ROWS - 1) // ROWS
        END2: tl.constexpr = END1 + (N2 + ROWS - 1) // ROWS
        GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
        lane = tl.arange(0, ROWS)
        if tile < END0:
            row = tile * ROWS + lane
            real = row < N0
            rows = weight0 + row.to(tl.int64) * stride0
            grid = scales0 + (tile * ROWS // GROUP) * GROUPS
            target = row
        elif tile < END1:
            row = (tile - END0) * ROWS + lane
            real = row < N1
            rows = weight1 + row.to(tl.int64) * stride1
            grid = scales1 + ((tile - END0) * ROWS // GROUP) * GROUPS
            target = N0 + row
        elif tile < END2:
            row = (tile - END1) * ROWS + lane
            real = row < N2
            rows = weight2 + row.to(tl.int64) * stride2
            grid = scales2 + ((tile - END1) * ROWS // GROUP) * GROUPS
            target = N0 + N1 + row
        else:
            row = (tile - END2) * ROWS + lane
            real = row < N3
            rows = weight3 + row.to(tl.int64) * stride3
            grid = scales3 + ((tile - END2) * ROWS // GROUP) * GROUPS
            target = N0 + N1 + N2 + row
        RUNS: tl.constexpr = COLUMNS // RUN
        column = tl.max_contiguous(tl.arange(0, COLUMNS), RUN)
        first_of_run = tl.arange(0, RUNS) * RUN
        x += token * x_stride
        acc = tl.zeros([ROWS, RUNS], tl.float32)
        squares = tl.zeros([COLUMNS], tl.float32)
        for first in tl.static_range(0, D, COLUMNS):
            inside = first + column < D
            weight = tl.load(rows[:, None] + first + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            group = (first + first_of_run) // GROUP
            scale = scale_of(grid + group, group < GROUPS, POWERS)
            if EARLY and first == 0:
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
            value = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares += value * value
                value *= tl.load(norm + first + column, mask=inside, other=0.0).to(tl.float32)
            acc += _products(weight, value, ROWS, RUNS, RUN) * scale[None, :]
        total = tl.sum(acc, 1)
        if HAS_NORM:
            total *= tl.rsqrt(tl.sum(squares, 0) / D + eps)
        dtype = out.dtype.element_ty
        total = total.to(dtype)
        if HAS_BASE:
            before = tl.load(base + token * base_stride + target, mask=real, other=0.0)
            total = (total.to(tl.float32) + before.to(tl.float32)).to(dtype)
        tl.store(out + token * (N0 + N1 + N2 + N3) + target, total, mask=real)

    @triton.jit
    def block_fp8_experts_up_vector_kernel(
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
        gate_stride,
        up_stride,
        D: tl.constexpr,
        INNER: tl.constexpr,
        SHARED: tl.constexpr,
        K: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        RUN: tl.constexpr,
        GROUP: tl.constexpr,
        POWERS: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """`silu(gate x) * (up x)`: one program makes ROWS entries of one token's routed or shared expert."""
        token = tl.program_id(0).to(tl.int64)
        TILES: tl.constexpr = (INNER + ROWS - 1) // ROWS
        SHARED_TILES: tl.constexpr = (SHARED + ROWS - 1) // ROWS
        GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
        HALF: tl.constexpr = (INNER + GROUP - 1) // GROUP * GROUPS
        # Ahead of the routed experts' tiles come the shared expert's, which need not wait to know the experts.
        tile = tl.program_id(1) - SHARED_TILES
        part = K
        RUNS: tl.constexpr = COLUMNS // RUN
        column = tl.max_contiguous(tl.arange(0, COLUMNS), RUN)
        first_of_run = tl.arange(0, RUNS) * RUN
        if tile >= 0:
            if EARLY:
                tl.extra.cuda.gdc_wait()
            part = tile // TILES
            first_row = tile % TILES * ROWS
            row = first_row + tl.arange(0, ROWS)
            real = row < INNER
            expert = tl.load(experts + token * K + part)
            gate_rows = gate_up + expert * expert_stride + row * row_stride
            up_rows = gate_rows + INNER * row_stride
            gate_grid = gate_up_scales + expert * (2 * HALF) + first_row // GROUP * GROUPS
            up_grid = gate_grid + HALF
        else:
            first_row = tl.program_id(1) * ROWS
            row = first_row + tl.arange(0, ROWS)
            real = row < SHARED
            gate_rows = gate + row.to(tl.int64) * gate_stride
            up_rows = up + row.to(tl.int64) * up_stride
            gate_grid = gate_scales + (first_row // GROUP * GROUPS).to(tl.int64)
            up_grid = up_scales + (first_row // GROUP * GROUPS).to(tl.int64)
        gate_sum = tl.zeros([ROWS, RUNS], tl.float32)
        up_sum = tl.zeros([ROWS, RUNS], tl.float32)
        for first in tl.static_range(0, D, COLUMNS):
            inside = first + column < D
            mask = real[:, None] & inside[None, :]
            gate_tile = tl.load(gate_rows[:, None] + first + column[None, :], mask=mask, other=0.0)
            up_tile = tl.load(up_rows[:, None] + first + column[None, :], mask=mask, other=0.0)
            group = (first + first_of_run) // GROUP
            gate_scale = scale_of(gate_grid + group, group < GROUPS, POWERS)
            up_scale = scale_of(up_grid + group, group < GROUPS, POWERS)
            if EARLY and first == 0:
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
            value = tl.load(x + token * x_stride + first + column, mask=inside, other=0.0).to(tl.float32)
            gate_sum += _products(gate_tile, value, ROWS, RUNS, RUN) * gate_scale[None, :]
            up_sum += _products(up_tile, value, ROWS, RUNS, RUN) * up_scale[None, :]
        dtype = hidden.dtype.element_ty
        # Rounded where a linear layer and an activation would.
        g = tl.sum(gate_sum, 1).to(dtype).to(tl.float32)
        u = tl.sum(up_sum, 1).to(dtype).to(tl.float32)
        value = (g * tl.sigmoid(g)).to(dtype).to(tl.float32) * u
        tl.store(hidden + token * (K * INNER + SHARED) + part * INNER + row, value.to(dtype), mask=real)

    @triton.jit
    def block_fp8_experts_down_vector_kernel(
        hidden,
        experts,
        weights,
        down,
        down_scales,
        shared_down,
        shared_scales,
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
        RUN: tl.constexpr,
        GROUP: tl.constexpr,
        POWERS: tl.constexpr,
        HAS_BASE: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """ROWS entries of one token's sum over its experts."""
        token = tl.program_id(0).to(tl.int64)
        first_row = tl.program_id(1) * ROWS
        row = first_row + tl.arange(0, ROWS)
        real = row < D
        RUNS: tl.constexpr = COLUMNS // RUN
        column = tl.max_contiguous(tl.arange(0, COLUMNS), RUN)
        first_of_run = tl.arange(0, RUNS) * RUN
        GROUPS: tl.constexpr = (INNER + GROUP - 1) // GROUP
        SHARED_GROUPS: tl.constexpr = (SHARED + GROUP - 1) // GROUP
        ROW_GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
        dtype = out.dtype.element_ty
        hidden += token * (K * INNER + SHARED)
        total = tl.zeros([ROWS], tl.float32)
        if EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        for part in tl.static_range(K):
            expert = tl.load(experts + token * K + part)
            rows = down + expert * expert_stride + row * row_stride
            grid = down_scales + expert * (ROW_GROUPS * GROUPS) + first_row // GROUP * GROUPS
            acc = tl.zeros([ROWS, RUNS], tl.float32)
            for first in tl.static_range(0, INNER, COLUMNS):
                inside = first + column < INNER
                tile = tl.load(
                    rows[:, None] + first + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
                )
                group = (first + first_of_run) // GROUP
                scale = scale_of(grid + group, group < GROUPS, POWERS)
                value = tl.load(hidden + part * INNER + first + column, mask=inside, other=0.0).to(tl.float32)
                acc += _products(tile, value, ROWS, RUNS, RUN) * scale[None, :]
            total += tl.sum(acc, 1).to(dtype).to(tl.float32) * tl.load(weights + token * K + part)
        total = total.to(dtype).to(tl.float32)
        if SHARED > 0:
            rows = shared_down + row.to(tl.int64) * shared_stride
            grid = shared_scales + first_row // GROUP * SHARED_GROUPS
            acc = tl.zeros([ROWS, RUNS], tl.float32)
            for first in tl.static_range(0, SHARED, COLUMNS):
                inside = first + column < SHARED
                tile = tl.load(
                    rows[:, None] + first + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
                )
                group = (first + first_of_run) // GROUP
                scale = scale_of(grid + group, group < SHARED_GROUPS, POWERS)
                value = tl.load(hidden + K * INNER + first + column, mask=inside, other=0.0).to(tl.float32)
                acc += _products(tile, value, ROWS, RUNS, RUN) * scale[None, :]
            total += tl.sum(acc, 1).to(dtype).to(tl.float32)
        if HAS_BASE:
            total += tl.load(base + token * base_stride + row, mask=real, other=0.0).to(tl.float32)
        tl.store(out + token * D + row, total.to(dtype), mask=real)
