"""Block fp8 weights times a few tokens on e4m3 matrix units: no weight is widened, and tokens come in two e4m3 pieces.

A bf16 value has eight significant bits and e4m3 four: scaled by a power of two for each 128 columns, it is the sum of
two e4m3 values, to 2^-17 of the largest of them. Weights go from memory to the matrix units as they are, as the rows
of a tile, and the products with both pieces are summed before the block's scale meets them.

Legend: T tokens, D hidden width, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..common.device_target import device_target
from ..common.early_launch import early_launch
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton
from .block_fp8_activations_triton import as_kernels_read
from .block_fp8_format import is_ue8m0
from .block_fp8_reference import GROUP
from .block_fp8_vector_triton import MAX_WEIGHTS

# Columns of a tile of products, of which tokens fill some.
TOKENS = 16
# Rows of weights in a tile: many where each is long and there are many of them.
FEW_ROWS, MANY_ROWS = 64, 128
LONG_GROUPS, MANY_OUTPUTS = 32, 4096
# What a program takes beside its groups of columns, in their time.
BEGINNING = 3
# Outputs of a program that adds up parts.
SUMMED = 512


def why_not_in_pieces(x: torch.Tensor, tokens: int = TOKENS) -> str | None:
    """Why these kernels are not for `x [T, D]` of at most `tokens`, or None when they are."""
    if x.shape[0] > tokens:
        return f"it is for at most {tokens} tokens"
    target = device_target(x.device)
    if target.backend != "cuda" or target.arch != 90:
        return "it is for compute capability 9.0"
    return None if x.dtype == torch.bfloat16 else f"two e4m3 values are a bf16 one, not {x.dtype}"


def tile_rows(outputs: int, width: int) -> int:
    """Rows of weights that a program takes."""
    many = outputs >= MANY_OUTPUTS and width >= LONG_GROUPS * GROUP
    return MANY_ROWS if many else FEW_ROWS


def split_count(tiles: int, groups: int, processors: int) -> int:
    """Programs, a power of two, that share the columns of a tile: what ends first when all have as much to do."""
    best, least = 1, float("inf")
    for splits in (1, 2, 4, 8, 16):
        if splits > 1 and (groups < 3 * splits or tiles * (splits // 2) >= 3 * processors):
            break
        # One program keeps too few bytes on their way for its processor.
        rounds = max(2, -(-tiles * splits // processors))
        time = rounds * (groups / splits + BEGINNING)
        if time < least:
            best, least = splits, time
    return best


def linear_in_pieces(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    base: torch.Tensor | None = None,
    splits: int | None = None,
    rows: int | None = None,
    stages: int = 4,
) -> torch.Tensor:
    """As `block_fp8_linear.block_fp8_vector_linear`, for bf16 `x [T, D]`, T at most `TOKENS`, and one kind of scales.

    `splits` programs share the columns of `rows` rows of weights; None chooses.
    """
    tokens, width = x.shape
    sizes = [weight.shape[0] for weight in weights]
    outputs = sum(sizes)
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    powers = is_ue8m0(scales[0])
    read = [as_kernels_read(weight, grid) for weight, grid in zip(weights, scales)]
    read += [read[0]] * (MAX_WEIGHTS - len(read))
    sizes += [0] * (MAX_WEIGHTS - len(sizes))
    rows = rows or tile_rows(outputs, width)
    tiles = sum(triton.cdiv(size, rows) for size in sizes)
    if splits is None:
        splits = split_count(tiles, triton.cdiv(width, GROUP), device_target(x.device).processors)
    parts = out
    if splits > 1:
        parts = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
    plain = {"HAS_NORM": norm is not None, "HAS_BASE": base is not None, "D": width}
    gain, before = x if norm is None else norm, out if base is None else base
    launcher(block_fp8_pieces_kernel, (tiles, splits), x)(
        x,
        *(weight for weight, _ in read),
        *(grid for _, grid in read),
        parts,
        gain,
        before,
        eps,
        tokens,
        x.stride(0),
        0 if base is None else base.stride(0),
        *(weight.stride(0) for weight, _ in read),
        N0=sizes[0],
        N1=sizes[1],
        N2=sizes[2],
        N3=sizes[3],
        ROWS=rows,
        TOKENS=TOKENS,
        GROUP=GROUP,
        SPLIT=splits > 1,
        POWERS=powers,
        **plain,
        num_warps=4,
        num_stages=stages,
        **early_launch(),
    )
    if splits > 1:
        launcher(sum_pieces_kernel, (tokens, triton.cdiv(outputs, SUMMED)), x)(
            parts,
            x,
            before,
            out,
            eps,
            tokens,
            outputs,
            x.stride(0),
            0 if base is None else base.stride(0),
            SPLITS=splits,
            BLOCK=SUMMED,
            **plain,
            num_warps=4,
            **early_launch(),
        )
    return out


if triton is not None:
    from ..common.early_launch import wait_for_kernels_ahead
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
        T,
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
        TOKENS: tl.constexpr,
        GROUP: tl.constexpr,
        SPLIT: tl.constexpr,
        POWERS: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_BASE: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """ROWS outputs of all tokens; with SPLIT one part of their sums, as fp32 `[parts, T, N]`."""
        tile = tl.program_id(0)
        END0: tl.constexpr = (N0 + ROWS - 1) // ROWS
        END1: tl.constexpr = END0 + (N1 + ROWS - 1) // ROWS
        END2: tl.constexpr = END1 + (N2 + ROWS - 1) // ROWS
        N: tl.constexpr = N0 + N1 + N2 + N3
        GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
        # Numbers alone are chosen here: what is known of a tile's addresses would be lost.
        if tile < END0:
            weights, grid, stride = weight0, scales0, stride0
            first_row = tile * ROWS
            size = N0
            target = 0
        elif tile < END1:
            weights, grid, stride = weight1, scales1, stride1
            first_row = (tile - END0) * ROWS
            size = N1
            target = N0
        elif tile < END2:
            weights, grid, stride = weight2, scales2, stride2
            first_row = (tile - END1) * ROWS
            size = N2
            target = N0 + N1
        else:
            weights, grid, stride = weight3, scales3, stride3
            first_row = (tile - END2) * ROWS
            size = N3
            target = N0 + N1 + N2
        row = first_row + tl.arange(0, ROWS)
        token = tl.arange(0, TOKENS)
        depth = tl.arange(0, GROUP)
        splits = tl.num_programs(1)
        begin, end = tl.program_id(1) * GROUPS // splits, (tl.program_id(1) + 1) * GROUPS // splits
        wait_for_kernels_ahead(EARLY)
        weights += tl.minimum(row, size - 1).to(tl.int64)[:, None] * stride + depth[None, :]
        rows = x + token[:, None] * x_stride + depth[None, :]
        grid += first_row // GROUP * GROUPS
        real = (token < T)[:, None]
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        squares = tl.zeros([TOKENS], tl.float32)
        for group in range(begin, end):
            if D % GROUP == 0:
                a = tl.load(weights + group * GROUP)
                value = tl.load(rows + group * GROUP, mask=real, other=0.0).to(tl.float32)
            else:
                inside = (group * GROUP + depth < D)[None, :]
                a = tl.load(weights + group * GROUP, mask=inside, other=0.0)
                value = tl.load(rows + group * GROUP, mask=real & inside, other=0.0).to(tl.float32)
            scale = scale_of(grid + group, group < GROUPS, POWERS)
            if HAS_NORM:
                if not SPLIT:
                    squares += tl.sum(value * value, 1)
                gain = tl.load(norm + group * GROUP + depth, mask=group * GROUP + depth < D, other=0.0)
                value *= gain.to(tl.float32)[None, :]
            first, second, inverse = in_pieces(value)
            acc += products_in_pieces(a, first, second) * (inverse * scale)[None, :]
        mask = (row < size)[:, None] & (token < T)[None, :]
        if SPLIT:
            out += tl.program_id(1).to(tl.int64) * T * N
        elif HAS_NORM:
            acc *= tl.rsqrt(squares / D + eps)[None, :]
        made = acc.to(out.dtype.element_ty)
        column = target + row
        if HAS_BASE and not SPLIT:
            before = tl.load(base + token[None, :] * base_stride + column[:, None], mask=mask, other=0.0)
            made = (made.to(tl.float32) + before.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + token[None, :] * N + column[:, None], made, mask=mask)

    @triton.jit(do_not_specialize=["T"])
    def sum_pieces_kernel(
        parts,
        x,
        base,
        out,
        eps,
        T,
        N,
        x_stride,
        base_stride,
        D: tl.constexpr,
        SPLITS: tl.constexpr,
        BLOCK: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_BASE: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """`out = base +` the sum of fp32 `parts [SPLITS, T, N]`, by the inverse rms of `x [T, D]` behind a norm."""
        wait_for_kernels_ahead(EARLY)
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        total = tl.zeros([BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(parts + (split * T.to(tl.int64) + row) * N + column, mask=inside, other=0.0)
        if HAS_NORM:
            lane = tl.arange(0, BLOCK)
            squares = tl.zeros([BLOCK], tl.float32)
            for first in tl.static_range(0, D, BLOCK):
                value = tl.load(x + row * x_stride + first + lane, mask=first + lane < D, other=0.0).to(tl.float32)
                squares += value * value
            total *= tl.rsqrt(tl.sum(squares, 0) / D + eps)
        made = total.to(out.dtype.element_ty)
        if HAS_BASE:
            before = tl.load(base + row * base_stride + column, mask=inside, other=0.0)
            made = (made.to(tl.float32) + before.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + row * N + column, made, mask=inside)
