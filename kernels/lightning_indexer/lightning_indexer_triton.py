"""The lightning indexer in Triton: scores and exact top-k of a prefill in one kernel, and the choice of the path.

Prefill: a program owns BQ queries (BQ * heads = 256 columns of a matrix product with the keys as rows) and visits
their keys in epochs. A loop scores an epoch into a buffer that stays in L2 and notes, a bit for each key, the scores
above the row's bound, which never exceeds the k-th best so far; the keys noted are then appended to the row's list; a
list that could overflow in the next epoch is cut to little more than its `topk` best, which raises the bound. Bounds
come from genuine scores, so any order of scores is selected exactly, at worst with one cut an epoch. Two programs
share an SM: one multiplies while the other reduces, appends or cuts.

Few queries (decode, short chunks): `lightning_indexer_decode_triton.py`.

Legend: B batch, S queries, T keys, H indexer heads, D their width; HP and DP powers of two; BQ queries and BK keys of
a tile.
"""

from __future__ import annotations

import torch

from ..common.device_target import device_target
from ..common.dispatch import Backend, Operation, takes_all
from ..common.kernel_constants import GREATEST_INT
from ..common.kernel_launch import launcher, rows_contiguous
from ..common.triton_support import tl, triton
from .indexer_quantization import e4m3_of_rows
from .lightning_indexer_decode_triton import (
    TILE_COLUMNS,
    TILE_KEYS,
    TYPICAL_WIDTH,
    indexer_score_slab,
    next_power_of_2,
)
from .lightning_indexer_hopper_gluon import hopper_supports, lightning_indexer_hopper

# Tiles of an epoch: a bit of an int32 for each.
EPOCH_TILES = 32
# What the kernels are tested for.
MAX_TOPK, MAX_HEADS, MIN_WIDTH, MAX_WIDTH = 4096, 64, 16, 256
# Fewer entries save nothing.
SHORTEST_LIST = 512
# One multiplies while the other reduces, appends or cuts.
PROGRAMS_PER_SM = 2


def unsupported_reason(q: torch.Tensor, k: torch.Tensor, topk: int, key_mask: torch.Tensor | None) -> str | None:
    """Why the Triton path cannot take these arguments; None if it can."""
    if triton is None:
        return "triton is not installed"
    # Queries for fp8 scoring are in e4m3 already, and exact in the keys' dtype.
    dtype = k.dtype if q.dtype == torch.float8_e4m3fn else q.dtype
    if dtype not in (torch.bfloat16, torch.float16) or k.dtype != dtype:
        return f"q and k must both be bfloat16 or float16 (got {q.dtype} and {k.dtype})"
    if not 1 <= q.shape[2] <= MAX_HEADS or not MIN_WIDTH <= q.shape[3] <= MAX_WIDTH:
        got = f"(got {q.shape[2]} of {q.shape[3]})"
        return f"1 to {MAX_HEADS} heads of width {MIN_WIDTH} to {MAX_WIDTH} are supported {got}"
    if topk > MAX_TOPK:
        return f"topk is at most {MAX_TOPK} (got {topk})"
    if key_mask is not None and key_mask.dim() == 3:
        return "a key_mask for each query ([B, S, T]) is not supported, only [B, T]"
    return None


def lightning_indexer_triton(q, k, weights, topk, scale, query_start, key_mask, key_start=None) -> torch.Tensor:
    """Arguments and result as `lightning_indexer`; `unsupported_reason` must be None.

    `q` may be e4m3; `k` are rows of `quantized_rows` then.
    """
    B, S = q.shape[:2]
    T = k.shape[1]
    out = torch.empty(B, S, min(topk, T), dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    q, k, weights = rows_contiguous(q), rows_contiguous(k), rows_contiguous(weights)
    starts = query_start.to(device=q.device).expand(B).contiguous()
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    first_keys = None if key_start is None else key_start.contiguous()
    _KERNELS(q.device, q, k, weights, topk, scale, starts, first_keys, mask, out)
    return out


def why_not_hopper(q: torch.Tensor, k: torch.Tensor, topk: int) -> str | None:
    """Why the Hopper kernel does not run for these tensors; it needs a block of queries for every multiprocessor."""
    _, arch, processors = device_target(q.device)
    if arch != 90:
        return "it is for compute capability 9.0"
    if q.shape[0] * q.shape[1] * q.shape[2] // TILE_COLUMNS < processors:
        return "there are too few queries"
    return None if hopper_supports(q, k, topk) else "the shapes, dtypes or strides are not what it takes"


def _in_hopper(q, k, weights, topk, scale, starts, first_keys, mask, out) -> None:
    _, arch, processors = device_target(q.device)
    scaled = (weights.float() * scale).contiguous()
    keys, scales = e4m3_of_rows(k) if q.dtype == torch.float8_e4m3fn else (k, None)
    redo = lightning_indexer_hopper(q, keys, scales, scaled, out.shape[2], starts, first_keys, mask, out, processors)
    if redo is not None:
        config = prefill_config(q.shape[2], q.shape[3], arch)
        _prefill(q.to(k.dtype), k, weights, topk, scale, starts, first_keys, mask, redo, out, config, processors)


def _why_not_split(q, *_) -> str | None:
    target = device_target(q.device)
    config = prefill_config(q.shape[2], q.shape[3], target.arch)
    if q.shape[0] * -(-q.shape[1] // config["BQ"]) < target.processors * PROGRAMS_PER_SM:
        return None
    return "there are queries for every multiprocessor"


def _in_split_keys(q, k, weights, topk, scale, starts, first_keys, mask, out) -> None:
    processors = device_target(q.device).processors
    indexer_score_slab(q.to(k.dtype), k, weights, topk, scale, starts, first_keys, mask, out, processors)


def _in_query_blocks(q, k, weights, topk, scale, starts, first_keys, mask, out) -> None:
    _, arch, processors = device_target(q.device)
    config = prefill_config(q.shape[2], q.shape[3], arch)
    programs = processors * PROGRAMS_PER_SM
    _prefill(q.to(k.dtype), k, weights, topk, scale, starts, first_keys, mask, None, out, config, programs)


def _example(new, queries: int) -> tuple:
    q, k, starts = new(1, queries, 32, 128), new(1, 8192, 128), new(1, dtype=torch.int64)
    return q, k, new(1, queries, 32), 2048, 1.0, starts, None, None, new(1, queries, 2048, dtype=torch.int32)


_KERNELS = Operation(
    "lightning_indexer: kernels",
    Backend("Gluon for Hopper", lambda q, k, weights, topk, *_: why_not_hopper(q, k, topk), _in_hopper, optional=True),
    Backend("Triton, keys split over programs", _why_not_split, _in_split_keys, optional=True),
    Backend("Triton, blocks of queries", takes_all, _in_query_blocks),
    prefill=lambda new: _example(new, 8192),
    token=lambda new: _example(new, 1),
)


def prefill_config(H: int, D: int, architecture: int | str) -> dict[str, int]:
    """Tile sizes of the prefill kernel for an architecture, as in `DeviceTarget`."""
    heads, width = next_power_of_2(H), max(16, next_power_of_2(D))
    # Shared memory holds the queries' tile and the stages of K; two programs fit an SM up to about 100 KB.
    # Only sm100 has room for the products of 256 columns outside the registers; elsewhere they spill.
    columns = TILE_COLUMNS if architecture == 100 else TILE_COLUMNS // 2
    columns = max(heads, min(columns, columns * TYPICAL_WIDTH // width))
    BQ = max(1, min(8, columns // heads))
    while BQ * heads < 16:
        BQ *= 2
    return {
        "BQ": BQ,
        "HP": heads,
        "DP": width,
        "BK": TILE_KEYS,
        "STAGES": 3,
        "PARTS": 2 if columns == TILE_COLUMNS and BQ > 1 else 1,
        "num_warps": 4,
    }


def list_capacity(topk: int, epoch: int) -> int:
    """Entries of a row's list: `topk` and an epoch of keys must fit, with slack so that cuts are rare."""
    return next_power_of_2(max(topk, SHORTEST_LIST) * 3 // 2 + epoch)


def _prefill(q, k, weights, topk, scale, starts, first_keys, mask, redo, out, config, programs) -> None:
    """All rows, or with `redo` int32 `[B, S]` only the blocks that hold a row marked there."""
    B, S, H, D = q.shape
    BQ, EPOCH = config["BQ"], EPOCH_TILES * config["BK"]
    CAP = list_capacity(topk, EPOCH)
    buffer = torch.empty(programs, BQ, EPOCH, dtype=torch.float32, device=q.device)
    exchange = torch.empty(programs, 2, BQ, config["BK"], dtype=torch.int32, device=q.device)
    lists = torch.empty(programs, BQ, CAP, dtype=torch.int64, device=q.device)
    tensors = (q, k, weights, starts, first_keys, mask, redo, out, buffer, exchange, lists)
    strides = (*q.stride()[:3], *k.stride()[:2], *weights.stride()[:2])
    sizes = (B, S, k.shape[1], out.shape[2], scale)
    given = {"HAS_FIRST": first_keys is not None, "HAS_MASK": mask is not None, "HAS_REDO": redo is not None}
    launcher(lightning_indexer_prefill_kernel, (programs,), q)(
        *tensors, *strides, *sizes, H=H, D=D, EPOCH=EPOCH, CAP=CAP, **given, **config, num_stages=config["STAGES"]
    )


if triton is not None:
    from .lightning_indexer_select_triton import bits_set, fill_rest, keep_best, pair_of

    _GREATEST = tl.constexpr(GREATEST_INT)

    @triton.jit
    def load_queries(
        rows,
        strides,
        first_query,
        S,
        scale,
        H: tl.constexpr,
        HP: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
        BQ: tl.constexpr,
    ):
        """Q of BQ queries, `[DP, BQ * HP]`, and their head weights times `scale`, `[BQ * HP]`; zero where padded."""
        q, weights = rows
        q_stride_s, q_stride_h, w_stride_s = strides
        # 0, which the compiler does not know: else it keeps what follows over the loop around, and spills.
        zero = first_query >> 30
        column = tl.arange(0, BQ * HP) + zero
        head = column % HP
        dim = tl.arange(0, DP) + zero
        query = (first_query + column // HP).to(tl.int64)
        real = (query < S) & (head < H)
        q_rows = q + query * q_stride_s + head * q_stride_h
        tile = tl.load(q_rows[:, None] + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0)
        w = tl.load(weights + query * w_stride_s + head, mask=real, other=0.0)
        return tl.trans(tile), w.to(tl.float32) * scale

    @triton.jit
    def weighted_scores(k_tile, q_tile, w, BK: tl.constexpr, BQ: tl.constexpr, HP: tl.constexpr):
        """`sum_h w[q, h] * relu(k . q[h])` of a tile of keys, `[BK, BQ]`."""
        dots = tl.dot(k_tile, q_tile)  # [BK, BQ * HP]
        # A NaN stays one, and is above no bound.
        terms = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]
        return tl.sum(tl.reshape(terms, [BK, BQ, HP]), 2)

    @triton.jit
    def halves(x, BQ: tl.constexpr, PARTS: tl.constexpr):
        """The first and the second half of `x` [BQ]; twice `x` if the columns are not parted."""
        if PARTS == 1:
            parts = (x, x)
        else:
            parts = tl.split(tl.trans(tl.reshape(x, [2, BQ // 2])))
        return parts

    @triton.jit
    def append_passed(
        passed,
        first_slot,
        slot,
        count,
        first_key,
        tiles,
        memory,
        EPOCH: tl.constexpr,
        CAP: tl.constexpr,
        HAS_FIRST: tl.constexpr,
    ):
        """Append an epoch's keys that passed to the rows' lists, in key order; returns the rows' new counts.

        `passed` [BQ, BK]: bit i of lane l stands for key `first_key + l * tiles + i`, with the score
        `buffer[q, i * BK + l]`.
        """
        buffer, exchange, lists = memory
        BQ: tl.constexpr = passed.shape[0]
        BK: tl.constexpr = passed.shape[1]
        row = tl.arange(0, BQ)
        lane = tl.arange(0, BK)
        lane_key = first_key + lane * tiles
        visible = tl.minimum(tl.maximum(slot[:, None] - lane_key[None, :] + 1, 0), tiles)  # [BQ, BK] keys of a lane
        below = (tl.full(visible.shape, 1, tl.int64) << visible.to(tl.int64)) - 1
        passed &= below.to(tl.int32)
        if HAS_FIRST:
            hidden = tl.minimum(tl.maximum(first_slot[:, None] - lane_key[None, :], 0), tiles)
            passed &= ~((tl.full(hidden.shape, 1, tl.int64) << hidden.to(tl.int64)) - 1).to(tl.int32)
        number = bits_set(passed)
        place = (row * CAP + count)[:, None] + tl.cumsum(number, 1) - number
        # Through memory into one entry a thread: gathers and scatters then need no exchange of layouts. `tiles >> 6`
        # is 0, unknown to the compiler, which would otherwise load four neighbours at once.
        spots = row[:, None] * BK + lane[None, :]
        tl.store(exchange + spots, passed)
        tl.store(exchange + BK * BQ + spots, place)
        tl.debug_barrier()
        entry = tl.arange(0, BK * BQ)
        passed = tl.load(exchange + (entry ^ (tiles >> 6)))
        place = tl.load(exchange + BK * BQ + (entry ^ (tiles >> 6)))
        key = first_key + (entry % BK) * tiles
        scores = buffer + (entry // BK) * EPOCH + entry % BK
        # Two bits a turn, so that their gathers are in flight together.
        for _ in tl.range(0, tl.max(number), 2, num_stages=1):
            first = passed != 0
            bit = bits_set((passed & -passed) - 1)
            rest = passed & (passed - 1)
            second = rest != 0
            next_bit = bits_set((rest & -rest) - 1)
            score = tl.load(scores + bit * BK, mask=first, other=0.0)
            next_score = tl.load(scores + next_bit * BK, mask=second, other=0.0)
            tl.store(lists + place, pair_of(score, key + bit), mask=first)
            tl.store(lists + place + 1, pair_of(next_score, key + next_bit), mask=second)
            place += 2
            passed = rest & (rest - 1)
        return count + tl.sum(number, 1)

    @triton.jit(do_not_specialize=["w_stride_b", "B", "S", "T", "TOPK"])
    def lightning_indexer_prefill_kernel(
        q,
        k,
        weights,
        starts,
        first_keys,
        mask,
        redo,
        out,
        buffer,
        exchange,
        lists,
        q_stride_b,
        q_stride_s,
        q_stride_h,
        k_stride_b,
        k_stride_t,
        w_stride_b,
        w_stride_s,
        B,
        S,
        T,
        TOPK,
        scale,
        H: tl.constexpr,
        HP: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
        BQ: tl.constexpr,
        BK: tl.constexpr,
        EPOCH: tl.constexpr,
        CAP: tl.constexpr,
        HAS_FIRST: tl.constexpr,
        HAS_MASK: tl.constexpr,
        HAS_REDO: tl.constexpr,
        STAGES: tl.constexpr,
        PARTS: tl.constexpr,
    ):
        """Scores and selection of whole query blocks, as described above; `TOPK` is the width of `out`."""
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        blocks = tl.cdiv(S, BQ) * B
        buffer += program.to(tl.int64) * EPOCH * BQ
        exchange += program.to(tl.int64) * 2 * BQ * BK
        lists += program.to(tl.int64) * BQ * CAP
        dim = tl.arange(0, DP)
        row = tl.arange(0, BQ)
        part_row = tl.arange(0, BQ // PARTS)
        lane = tl.arange(0, BK)

        # Longest rows first, back and forth, so that programs end together.
        for turn in tl.range(0, tl.cdiv(blocks, programs), num_stages=1):
            block = turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)
            b = (block % B).to(tl.int64)
            first_query = (tl.cdiv(S, BQ) - 1 - block // B) * BQ
            wanted = block < blocks
            if HAS_REDO:
                marked = tl.load(redo + b * S + first_query + row, mask=wanted & (first_query + row < S), other=0)
                wanted = tl.max(marked) > 0
            if wanted:
                start = tl.load(starts + b).to(tl.int32)
                slot = start + first_query + row  # [BQ]
                slot = tl.where(first_query + row < S, tl.minimum(slot, T - 1), -1)
                end = tl.max(slot) + 1
                first_slot = tl.zeros([BQ], tl.int32)
                if HAS_FIRST:
                    real = first_query + row < S
                    first_slot = tl.load(first_keys + b * S + first_query + row, mask=real, other=_GREATEST)
                    first_slot = tl.maximum(first_slot, 0)
                begin = tl.min(first_slot)

                rows, strides = (q + b * q_stride_b, weights + b * w_stride_b), (q_stride_s, q_stride_h, w_stride_s)
                q_tile, w = load_queries(rows, strides, first_query, S, scale, H, HP, D, DP, BQ // PARTS)
                if PARTS == 2:
                    second = first_query + BQ // 2
                    q_tile1, w1 = load_queries(rows, strides, second, S, scale, H, HP, D, DP, BQ // PARTS)

                bound = tl.full([BQ], float("-inf"), tl.float32)
                count = tl.zeros([BQ], tl.int32)
                for epoch in tl.range(begin, end, EPOCH, num_stages=1):
                    # Tile i holds keys i, i + tiles, i + 2 * tiles, ...: bit i of a lane's word stands for a key, and
                    # lanes and bits read in order are keys in order.
                    tiles = tl.minimum(tl.cdiv(end - epoch, BK), EPOCH // BK)
                    lane_key = epoch + lane * tiles
                    passed = tl.zeros([BK, BQ // PARTS], tl.int32)
                    passed1 = tl.zeros([BK, BQ // PARTS], tl.int32)
                    bound0, bound1 = halves(bound, BQ, PARTS)
                    for i in tl.range(0, tiles, num_stages=STAGES):
                        k_start = k + b * k_stride_b + (epoch + i) * k_stride_t.to(tl.int64)
                        k_rows = k_start + tl.minimum(lane * tiles, T - 1 - epoch - i) * k_stride_t
                        if D == DP:
                            k_tile = tl.load(k_rows[:, None] + dim[None, :])  # [BK, DP]
                        else:
                            k_tile = tl.load(k_rows[:, None] + dim[None, :], mask=(dim < D)[None, :], other=0.0)
                        spot = buffer + i * BK + lane[:, None] + part_row[None, :] * EPOCH
                        score = weighted_scores(k_tile, q_tile, w, BK, BQ // PARTS, HP)  # [BK, BQ]
                        tl.store(spot, score)
                        passed |= (score > bound0[None, :]).to(tl.int32) << i
                        if PARTS == 2:
                            score = weighted_scores(k_tile, q_tile1, w1, BK, BQ // PARTS, HP)
                            tl.store(spot + BQ // 2 * EPOCH, score)
                            passed1 |= (score > bound1[None, :]).to(tl.int32) << i
                    tl.debug_barrier()
                    allowed = tl.full([BK], -1, tl.int32)
                    if HAS_MASK:
                        bit = tl.arange(0, EPOCH // BK)
                        key = lane_key[:, None] + bit[None, :]
                        byte = tl.load(mask + b * T + key, mask=(bit < tiles)[None, :] & (key < T), other=0)
                        allowed = tl.sum((byte != 0).to(tl.int32) << bit[None, :], 1)
                    if PARTS == 2:
                        both = tl.trans(tl.join(passed, passed1), 2, 1, 0)  # [2, BQ / 2, BK]
                        words = tl.reshape(both, [BQ, BK])
                    else:
                        words = tl.trans(passed)
                    memory = (buffer, exchange, lists)
                    words &= allowed[None, :]
                    count = append_passed(words, first_slot, slot, count, epoch, tiles, memory, EPOCH, CAP, HAS_FIRST)
                    tl.debug_barrier()
                    if tl.max(count) > CAP - EPOCH:
                        for i in tl.range(0, BQ, num_stages=1):
                            n = tl.sum(tl.where(row == i, count, 0))
                            if n > TOPK:
                                list_i = lists + i * CAP
                                kth, kept = keep_best(list_i, n, TOPK, TOPK // 8, list_i, CAP, False)
                                bound = tl.where(row == i, kth, bound)
                                count = tl.where(row == i, kept, count)
                for i in tl.range(0, BQ, num_stages=1):
                    if first_query + i < S:
                        n = tl.sum(tl.where(row == i, count, 0))
                        out_i = out + (b * S + first_query + i) * TOPK
                        keep_best(lists + i * CAP, n, TOPK, 0, out_i, CAP, True)
                        fill_rest(out_i, tl.minimum(n, TOPK), TOPK)
