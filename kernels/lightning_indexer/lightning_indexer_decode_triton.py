"""The lightning indexer in Triton for few queries: the keys of a row are split over many programs.

Three launches, each with lengths read on the device:

1. scores of a slab of rows, minus infinity where a key is not visible or its score NaN; only the visible part is
   written;
2. a guess of each row's k-th best score from a sample, and, by pieces of the row, the keys whose score is above it;
3. if at least `topk` and at most CAP keys passed, the exact top-k of those; otherwise the row's scores are visited in
   order with a running bound, as the prefill kernel does. Either way the selection is exact.

Legend: as `lightning_indexer_triton.py`; `s` first query of a slab.
"""

from __future__ import annotations

import torch

from ..common.early_launch import early_launch, wait_for_kernels_ahead
from ..common.kernel_constants import GREATEST_INT
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton

# Score slab in bytes: little more than L2 holds. 64 rows of 200K keys in one took 1.334 ms, in two of 48 MiB 1.374.
SLAB_BYTES = 64 * 2**20
# Keys of a tile, and columns (queries * heads) at most: K is read once for every so many of them.
TILE_KEYS, TILE_COLUMNS = 64, 256
# Wider heads leave room for fewer columns.
TYPICAL_WIDTH = 128
# Keys of a row that one program filters, those that it samples for its guess, and those between two cuts of a list.
PIECE_KEYS = 2048
SAMPLE = 4096
EPOCH_KEYS = 2048
# Rows of fewer pieces share a variant of the kernel: up to 262,144 keys.
LEAST_PIECES = 128


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()


def score_config(S: int, H: int, D: int) -> dict[str, int]:
    """Tile sizes of the score kernel: as many queries share a tile of keys as 256 columns hold."""
    width = max(16, next_power_of_2(D))
    heads = next_power_of_2(H)
    limit = max(heads, min(TILE_COLUMNS, TILE_COLUMNS * TYPICAL_WIDTH // width))
    BQ = max(1, min(8, limit // heads, next_power_of_2(S)))
    while BQ * heads < 16:
        heads *= 2
    return {"BQ": BQ, "HP": heads, "DP": width, "BK": TILE_KEYS, "STAGES": 2 if BQ * heads > 64 else 4, "num_warps": 4}


def indexer_score_slab(q, k, weights, topk, scale, starts, first_keys, mask, out, multiprocessors) -> None:
    """Fill `out` [B, S, min(topk, T)] a slab of rows at a time."""
    B, S, H, D = q.shape
    T = k.shape[1]
    config = score_config(S, H, D)
    rows = max(1, SLAB_BYTES // (4 * T))
    batches = max(1, min(B, rows // S))
    # Slabs of equal size: a last one of few rows would leave the device idle.
    batches = -(-B // -(-B // batches))
    queries = S if rows >= S else max(config["BQ"], rows // config["BQ"] * config["BQ"])
    pieces = -(-T // PIECE_KEYS)
    most_pieces = max(LEAST_PIECES, next_power_of_2(pieces))
    slab_rows = batches * queries
    cap = next_power_of_2(max(3 * out.shape[2] + 512, 2 * EPOCH_KEYS))
    scores = torch.empty(slab_rows, T, dtype=torch.float32, device=q.device)
    passed = torch.empty(slab_rows, T, dtype=torch.int32, device=q.device)
    counts = torch.empty(slab_rows, pieces + 1, dtype=torch.int32, device=q.device)
    guesses = torch.empty(slab_rows, dtype=torch.float32, device=q.device)
    lists = torch.empty(slab_rows, cap, dtype=torch.int64, device=q.device)
    # Enough programs to fill the device, few enough that a program's queries are read once for many keys.
    tiles = -(-T // config["BK"])
    groups = batches * -(-queries // config["BQ"])
    tiles_each = max(1, min(32, tiles * groups // (6 * multiprocessors)))
    for b in range(0, B, batches):
        nb = min(batches, B - b)
        for s in range(0, S, queries):
            ns = min(queries, S - s)
            part = (slice(b, b + nb), slice(s, s + ns))
            q_part, w_part, out_part = q[part], weights[part], out[part]
            k_part, starts_part = k[b : b + nb], starts[b : b + nb]
            first_part = None if first_keys is None else first_keys[part].contiguous()
            mask_part = None if mask is None else mask[b : b + nb]
            grid = (-(-tiles // tiles_each), -(-ns // config["BQ"]), nb)
            tensors = (q_part, k_part, w_part, starts_part, first_part, mask_part, scores)
            strides = (q_part.stride()[:3], k_part.stride()[:2], *w_part.stride()[:2])
            sizes = (s, ns, T, scale, tiles_each)
            given = {"HAS_FIRST": first_keys is not None, "HAS_MASK": mask is not None}
            launcher(indexer_scores_kernel, grid, q_part)(
                *tensors, *strides, *sizes, H=H, D=D, **given, **config, num_stages=config["STAGES"], **early_launch()
            )
            filtered = (scores, starts_part, passed, counts, guesses)
            sizes = (s, ns, T, pieces, out.shape[2])
            launcher(indexer_filter_kernel, (pieces, ns, nb), scores)(
                *filtered, *sizes, SAMPLE=SAMPLE, PIECE=PIECE_KEYS, CAP=cap, num_warps=4, **early_launch()
            )
            constants = {"PIECES": most_pieces, "PIECE": PIECE_KEYS, "EPOCH": EPOCH_KEYS, "CAP": cap}
            launcher(indexer_select_kernel, (ns, nb), scores)(
                *filtered, lists, out_part, *out_part.stride()[:2], *sizes, **constants, num_warps=8, **early_launch()
            )


if triton is not None:
    from .lightning_indexer_select_triton import (
        append_above,
        fill_rest,
        float_of_ordered,
        keep_best,
        kth_largest,
        ordered_int,
        pair_of,
    )

    _GREATEST = tl.constexpr(GREATEST_INT)
    # Entries of a list that a program gathers at once.
    _GATHERED = tl.constexpr(1024)

    @triton.jit(do_not_specialize=["w_stride_b", "s", "S", "T", "tiles_each"])
    def indexer_scores_kernel(
        q,
        k,
        weights,
        starts,
        first_keys,
        mask,
        scores,
        q_strides,
        k_strides,
        w_stride_b,
        w_stride_s,
        s,
        S,
        T,
        scale,
        tiles_each,
        H: tl.constexpr,
        HP: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
        BQ: tl.constexpr,
        BK: tl.constexpr,
        HAS_FIRST: tl.constexpr,
        HAS_MASK: tl.constexpr,
        STAGES: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """Scores of `tiles_each` tiles of keys for BQ rows of the slab, minus infinity where a key is not visible."""
        wait_for_kernels_ahead(EARLY)
        b = tl.program_id(2).to(tl.int64)
        first_query = tl.program_id(1) * BQ
        row = tl.arange(0, BQ)
        slot = tl.load(starts + b).to(tl.int32) + s + first_query + row  # [BQ]
        slot = tl.where(first_query + row < S, tl.minimum(slot, T - 1), -1)
        begin = tl.program_id(0) * tiles_each * BK
        end = tl.minimum(begin + tiles_each * BK, tl.max(slot) + 1)
        if begin < end:
            column = tl.arange(0, BQ * HP)
            head = column % HP
            dim = tl.arange(0, DP)
            query = (first_query + column // HP).to(tl.int64)
            real = (query < S) & (head < H)
            q_rows = q + b * q_strides[0] + query * q_strides[1] + head * q_strides[2]
            q_tile = tl.load(q_rows[:, None] + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0)
            q_tile = tl.trans(q_tile)  # [DP, BQ * HP]
            w = tl.load(weights + b * w_stride_b + query * w_stride_s + head, mask=real, other=0.0)
            w = w.to(tl.float32) * scale
            slab_row = b * S + first_query + row
            if HAS_FIRST:
                first_slot = tl.load(first_keys + slab_row, mask=first_query + row < S, other=0)
            for first in tl.range(begin, end, BK, num_stages=STAGES):
                key = first + tl.arange(0, BK)
                k_tile_start = k + b * k_strides[0] + first * k_strides[1].to(tl.int64)
                k_rows = k_tile_start + tl.minimum(tl.arange(0, BK), T - 1 - first) * k_strides[1]
                if D == DP:
                    k_tile = tl.load(k_rows[:, None] + dim[None, :])  # [BK, DP]
                else:
                    k_tile = tl.load(k_rows[:, None] + dim[None, :], mask=(dim < D)[None, :], other=0.0)
                dots = tl.dot(k_tile, q_tile)  # [BK, BQ * HP]
                terms = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]
                score = tl.sum(tl.reshape(terms, [BK, BQ, HP]), 2)  # [BK, BQ]
                seen = key[:, None] <= slot[None, :]
                if HAS_FIRST:
                    seen &= key[:, None] >= first_slot[None, :]
                if HAS_MASK:
                    allowed = tl.load(mask + b * T + key, mask=key < T, other=0)
                    seen &= (allowed != 0)[:, None]
                # NaN would be sorted by its bits.
                score = tl.where(seen & (score == score), score, float("-inf"))
                inside = (key < T)[:, None] & (first_query + row < S)[None, :]
                tl.store(scores + slab_row[None, :] * T + key[:, None], score, mask=inside)

    @triton.jit(do_not_specialize=["s", "S", "T", "pieces", "TOPK"])
    def indexer_filter_kernel(
        scores,
        starts,
        passed,
        counts,
        guesses,
        s,
        S,
        T,
        pieces,
        TOPK,
        SAMPLE: tl.constexpr,
        PIECE: tl.constexpr,
        CAP: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """The keys of a piece of a row above a guess of the row's k-th best, their number, and the guess."""
        wait_for_kernels_ahead(EARLY)
        b = tl.program_id(2).to(tl.int64)
        piece = tl.program_id(0)
        query = tl.program_id(1)
        n = tl.minimum(tl.load(starts + b).to(tl.int32) + s + query, T - 1) + 1
        slab_row = b * S + query
        scores += slab_row * T
        first = piece * PIECE
        if first < n:
            guess = tl.full((), float("-inf"), tl.float32)
            if n > CAP:
                # One key at random in each of SAMPLE equal strata; every program of the row draws the same ones.
                # The expected count above rank r of the sample is r * n / SAMPLE; five deviations keep it over topk.
                stratum = tl.arange(0, SAMPLE)
                jitter = ((stratum * -1640531527) ^ (stratum * 40503 >> 7)) & 0xFFFF
                position = (stratum.to(tl.int64) * n + ((jitter.to(tl.int64) * n) >> 16)) // SAMPLE
                sample = ordered_int(tl.load(scores + tl.minimum(position, n - 1)))
                expected = TOPK.to(tl.float32) * SAMPLE / n.to(tl.float32)
                rank = (expected + 5.0 * tl.sqrt(expected) + 4.0).to(tl.int32)
                if rank < SAMPLE:
                    kth, _ = kth_largest(sample, rank, rank // 4)
                    guess = float_of_ordered(kth)
            key = first + tl.arange(0, PIECE)
            score = tl.load(scores + key, mask=key < n, other=float("-inf"))
            keep = score > guess
            place = tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(passed + slab_row * T + first + place, key, mask=keep)
            tl.store(counts + slab_row * (pieces + 1) + piece, tl.sum(keep.to(tl.int32)))
            if piece == 0:
                tl.store(guesses + slab_row, guess)

    @triton.jit(do_not_specialize=["s", "S", "T", "pieces", "TOPK"])
    def indexer_select_kernel(
        scores,
        starts,
        passed,
        counts,
        guesses,
        lists,
        out,
        out_stride_b,
        out_stride_s,
        s,
        S,
        T,
        pieces,
        TOPK,
        PIECES: tl.constexpr,
        PIECE: tl.constexpr,
        EPOCH: tl.constexpr,
        CAP: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """The exact selection of a row: among the keys that passed if they suffice, else among all."""
        wait_for_kernels_ahead(EARLY)
        b = tl.program_id(1).to(tl.int64)
        query = tl.program_id(0)
        n = tl.minimum(tl.load(starts + b).to(tl.int32) + s + query, T - 1) + 1
        slab_row = b * S + query
        scores += slab_row * T
        passed += slab_row * T
        counts += slab_row * (pieces + 1)
        lists += slab_row * CAP
        out += b * out_stride_b + query * out_stride_s

        used = tl.cdiv(tl.maximum(n, 0), PIECE)
        piece = tl.arange(0, PIECES)
        below = tl.cumsum(tl.load(counts + piece, mask=piece < used, other=0), 0)  # [PIECES], inclusive
        total = tl.max(below)
        guess = tl.full((), float("-inf"), tl.float32)
        if n > 0:
            guess = tl.load(guesses + slab_row)
        tl.debug_barrier()
        tl.store(counts + piece, below, mask=piece < used)
        tl.debug_barrier()
        count = total
        if (total <= CAP) & ((total >= TOPK) | (guess == float("-inf"))):
            # Entry e lies in the first piece whose inclusive count exceeds e.
            for first in tl.range(0, total, _GATHERED, num_stages=1):
                entry = first + tl.arange(0, _GATHERED)
                valid = entry < total
                home = tl.zeros([_GATHERED], tl.int32)
                step = tl.full((), PIECES, tl.int32)
                while step > used:
                    step = step // 2
                while step > 0:
                    probe = home + step
                    before = tl.load(counts + probe - 1, mask=valid & (probe <= used), other=_GREATEST)
                    home = tl.where(before <= entry, probe, home)
                    step = step // 2
                base = tl.load(counts + home - 1, mask=valid & (home > 0), other=0)
                key = tl.load(passed + home * PIECE + entry - base, mask=valid, other=0)
                score = tl.load(scores + key, mask=valid, other=0.0)
                tl.store(lists + entry, pair_of(score, key), mask=valid)
            tl.debug_barrier()
        else:
            bound = tl.full([1], float("-inf"), tl.float32)
            counted = tl.zeros([1], tl.int32)
            for first in tl.range(0, n, EPOCH, num_stages=1):
                key = first + tl.arange(0, EPOCH)
                score = tl.load(scores + key, mask=key < n, other=float("-inf"))[None, :]
                seen = score > float("-inf")
                counted = append_above(score, seen, key, bound, counted, lists, CAP)
                tl.debug_barrier()
                held = tl.max(counted)
                if held > CAP - EPOCH:
                    kth, held = keep_best(lists, held, TOPK, TOPK // 8, lists, CAP, False)
                    bound = tl.full([1], 0.0, tl.float32) + kth
                    counted = tl.zeros([1], tl.int32) + held
            count = tl.max(counted)
        keep_best(lists, count, TOPK, 0, out, CAP, True)
        fill_rest(out, tl.minimum(count, TOPK), TOPK)
