"""The lightning indexer's prefill for Hopper (sm90) in Gluon: scores by two warp groups in turn, selection by a third.

A program owns BQ queries (BQ * heads = 256 columns) and visits their keys in tiles of 64. Three warp groups:

- two score groups take the tiles in turn: while one's matrix product runs, the other reduces its own over the heads;
  each copies its next tiles to shared memory (TMA) itself;
- the selector appends the scores above a row's bound to the row's list, in key order, cuts a list that is full, and
  writes a finished block's selections while the next block's first tiles are scored.

The bound comes from a sample: the same kernel first scores every `SAMPLE_STRIDE`-th key and gives for each query the
score of a rank that should leave a little more than `topk` of all keys above it. Nothing rests on the guess: a list
that ends with `topk` entries or more holds the exact selection (`lightning_indexer_select_triton.py`), and the rows of
the others are marked in `redo` for the portable kernel.
"""

from __future__ import annotations

import torch

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Renamed after Triton 3.6.
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier
    load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
except (ImportError, AttributeError):
    gluon = None

COLUMNS = 256
TILE_KEYS = 64
KEY_STAGES = 4
SCORE_SLOTS = 8
# Tiles between two looks at the lists' lengths.
CHECK_TILES = 16
SAMPLE_STRIDE = 32
# Lists of fewer than this many keys need no guess.
LIST_KEYS = 6144
SAMPLE_LIST_KEYS = 2048
# Below this top-k a list holds so many times its keys that cuts are rare without a guess.
LEAST_GUESSED_TOPK = 1024


def hopper_supports(q: torch.Tensor, k: torch.Tensor, topk: int) -> bool:
    """Whether the kernel takes these tensors: 16, 32 or 64 heads of width 64 or 128, rows at multiples of 16 bytes."""
    B, S, H, D = q.shape
    T = k.shape[1]
    return (
        gluon is not None
        and H in (16, 32, 64)
        and D in (64, 128)
        and k.dtype == q.dtype
        and q.is_contiguous()
        and q.data_ptr() % 16 == 0
        and k.data_ptr() % 16 == 0
        and k.stride(1) % 16 == 0
        and (B == 1 or k.stride(0) == T * k.stride(1))
        and topk + CHECK_TILES * TILE_KEYS < LIST_KEYS
    )


def guess_rank(topk: int) -> int:
    """Rank in the sample whose score at least `topk` of all keys reach, with odds of 30 million to one for 2,048.

    The sampled ones among the `topk` best are nearly Poisson distributed with mean `topk / SAMPLE_STRIDE`.
    """
    expected = topk / SAMPLE_STRIDE
    return int(expected + 5.5 * expected**0.5 + 4)


def lightning_indexer_hopper(q, k, weights, topk, starts, first_keys, mask, out, programs) -> torch.Tensor:
    """Fill `out`; returns `redo` int32 `[B, S]`, 1 for rows whose guess was too high: their selection is not right.

    `weights`: fp32 `[B, S, H]`, contiguous, times the scale; the rest as in `lightning_indexer_triton`.
    """
    B, S, H, D = q.shape
    redo = torch.zeros(B, S, dtype=torch.int32, device=q.device)
    guesses = None
    if topk >= LEAST_GUESSED_TOPK and k.shape[1] > LIST_KEYS:
        guesses = torch.empty(B, S, dtype=torch.float32, device=q.device)
        sample = k[:, ::SAMPLE_STRIDE].contiguous()
        sample_mask = None if mask is None else mask[:, ::SAMPLE_STRIDE].contiguous()
        last = k.shape[1] - 1
        _launch(
            q,
            sample,
            weights,
            guess_rank(topk),
            starts,
            first_keys,
            sample_mask,
            out,
            redo,
            guesses,
            last,
            programs,
            True,
        )
    _launch(q, k, weights, topk, starts, first_keys, mask, out, redo, guesses, k.shape[1] - 1, programs, False)
    return redo


def _launch(q, k, weights, topk, starts, first_keys, mask, out, redo, guesses, last_slot, programs, sampling) -> None:
    B, S, H, D = q.shape
    T = k.shape[1]
    BQ = COLUMNS // H
    capacity = SAMPLE_LIST_KEYS if sampling else LIST_KEYS
    list_scores = torch.empty(programs, 2, BQ, capacity, dtype=torch.float32, device=q.device)
    list_keys = torch.empty(programs, 2, BQ, capacity, dtype=torch.int32, device=q.device)
    element = gl.float16 if q.dtype == torch.float16 else gl.bfloat16
    q_rows, k_rows = q.view(B * S * H, D), k.as_strided((B * T, D), (k.stride(1), 1))
    q_block, k_block = [COLUMNS, D], [TILE_KEYS, D]
    q_desc = TensorDescriptor.from_tensor(q_rows, q_block, gl.NVMMASharedLayout.get_default_for(q_block, element))
    k_desc = TensorDescriptor.from_tensor(k_rows, k_block, gl.NVMMASharedLayout.get_default_for(k_block, element))
    lightning_indexer_hopper_kernel[(programs,)](
        q_desc,
        k_desc,
        weights,
        starts,
        first_keys,
        mask,
        guesses,
        out,
        redo,
        list_scores,
        list_keys,
        B,
        S,
        T,
        last_slot,
        topk,
        out.shape[2],
        H=H,
        BQ=BQ,
        CAPACITY=capacity,
        STRIDE=SAMPLE_STRIDE if sampling else 1,
        HAS_FIRST=first_keys is not None,
        HAS_MASK=mask is not None,
        HAS_GUESS=guesses is not None and not sampling,
        SAMPLING=sampling,
        STAGES=KEY_STAGES,
        SLOTS=SCORE_SLOTS,
        CHECK=CHECK_TILES,
        num_warps=4,
    )


if gluon is not None:

    @gluon.jit
    def _add(a, b):
        return a + b

    @gluon.jit
    def _ordered(x):
        """int32 that sorts like the fp32 `x`; -0.0 and 0.0 are equal."""
        bits = gl.where(x == 0.0, 0.0, x).to(gl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @gluon.jit
    def _block_of(
        turn, starts, first_keys, B, S, last_slot, BQ: gl.constexpr, STRIDE: gl.constexpr, HAS_FIRST: gl.constexpr
    ):
        """Batch, first query (negative: no block), first key and number of tiles of a program's block at a turn.

        Longest rows first, back and forth, so that programs end together.
        """
        program = gl.program_id(0)
        programs = gl.num_programs(0)
        block = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
        groups = (S + BQ - 1) // BQ
        b = block % B
        first_query = (groups - 1 - block // B) * BQ
        tiles = gl.full((), 0, gl.int32)
        begin = gl.full((), 0, gl.int32)
        if first_query >= 0:
            start = gl.load(starts + b).to(gl.int32)
            end = gl.minimum(start + gl.minimum(first_query + BQ, S) - 1, last_slot) // STRIDE + 1
            if HAS_FIRST:
                begin = gl.full((), 2147483647, gl.int32)
                for i in gl.static_range(BQ):
                    query = gl.minimum(first_query + i, S - 1)
                    begin = gl.minimum(begin, gl.load(first_keys + b.to(gl.int64) * S + query))
                begin = (gl.maximum(begin, 0) + STRIDE - 1) // STRIDE
            tiles = gl.maximum(end - begin + 63, 0) // 64
        return b, first_query, begin, tiles

    @gluon.jit
    def _load_queries(
        q_desc,
        weights,
        q_tiles,
        w_tiles,
        q_full,
        turn,
        b,
        first_query,
        S,
        H: gl.constexpr,
        BQ: gl.constexpr,
    ):
        """Start to copy a block's queries, and write its weights, into the buffers of the turn's parity."""
        column = gl.arange(0, BQ * H, layout=gl.BlockedLayout([2], [32], [4], [0]))
        if first_query >= 0:
            parity = turn & 1
            first_row = b * S + first_query
            mbarrier.expect(q_full.index(parity), q_desc.block_type.nbytes)
            load_tile(q_desc, [first_row * H, 0], q_full.index(parity), q_tiles.index(parity))
            w = gl.load(weights + first_row.to(gl.int64) * H + column, mask=first_query + column // H < S, other=0.0)
            w_tiles.index(parity).store(w)
            barrier()
            mbarrier.arrive(q_full.index(parity), count=1)

    @gluon.jit
    def _load_keys(
        k_desc,
        k_tiles,
        k_full,
        starts,
        first_keys,
        tile,
        turn,
        done,
        row,
        tiles,
        turns,
        B,
        S,
        T,
        last_slot,
        BQ: gl.constexpr,
        STRIDE: gl.constexpr,
        HAS_FIRST: gl.constexpr,
        STAGES: gl.constexpr,
    ):
        """Start to copy the program's tile number `tile`, sought from a block on; returns the block it is in.

        A block is its turn, the tiles `done` before it, its first `row` of keys and its number of tiles.
        """
        while (tile - done >= tiles) & (turn < turns):
            done += tiles
            turn += 1
            b, first_query, begin, tiles = _block_of(turn, starts, first_keys, B, S, last_slot, BQ, STRIDE, HAS_FIRST)
            row = b * T + begin
        if turn < turns:
            stage = tile % STAGES
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            load_tile(k_desc, [row + (tile - done) * 64, 0], k_full.index(stage), k_tiles.index(stage))
        return turn, done, row, tiles

    @gluon.jit
    def _score_group(
        group: gl.constexpr,
        k_desc,
        starts,
        first_keys,
        q_tiles,
        w_tiles,
        k_tiles,
        slots,
        q_full,
        k_full,
        slot_full,
        slot_empty,
        my_turn,
        turns,
        B,
        S,
        T,
        last_slot,
        H: gl.constexpr,
        BQ: gl.constexpr,
        STRIDE: gl.constexpr,
        HAS_FIRST: gl.constexpr,
        STAGES: gl.constexpr,
        SLOTS: gl.constexpr,
    ):
        acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BQ * H, 16])
        # The next tile to load, and the block it is in.
        ahead = gl.full((), 0, gl.int32) + group
        b, first_query, begin, tiles_there = _block_of(0, starts, first_keys, B, S, last_slot, BQ, STRIDE, HAS_FIRST)
        turn_there = gl.full((), 0, gl.int32)
        done_there = gl.full((), 0, gl.int32)
        row_there = b * T + begin
        for _ in gl.static_range(STAGES // 2):
            turn_there, done_there, row_there, tiles_there = _load_keys(
                k_desc,
                k_tiles,
                k_full,
                starts,
                first_keys,
                ahead,
                turn_there,
                done_there,
                row_there,
                tiles_there,
                turns,
                B,
                S,
                T,
                last_slot,
                BQ,
                STRIDE,
                HAS_FIRST,
                STAGES,
            )
            ahead += 2
        done = gl.full((), 0, gl.int32)
        mine = gl.full((), 0, gl.int32)
        for turn in range(turns):
            b, first_query, begin, tiles = _block_of(turn, starts, first_keys, B, S, last_slot, BQ, STRIDE, HAS_FIRST)
            if first_query >= 0:
                parity = turn & 1
                mbarrier.wait(q_full.index(parity), (turn >> 1) & 1)
                for t in range((group + done) & 1, tiles, 2):
                    stage = (done + t) % STAGES
                    slot = (done + t) % SLOTS
                    mbarrier.wait(k_full.index(stage), ((done + t) // STAGES) & 1)
                    mbarrier.wait(my_turn.index(group), (mine & 1) ^ (1 - group))
                    acc = gl.zeros([64, BQ * H], gl.float32, acc_layout)
                    acc = warpgroup_mma(
                        k_tiles.index(stage), q_tiles.index(parity).permute((1, 0)), acc, use_acc=False, is_async=True
                    )
                    mbarrier.arrive(my_turn.index(1 - group), count=1)
                    mine += 1
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    w = w_tiles.index(parity).load(gl.SliceLayout(0, acc_layout))
                    terms = gl.maximum(acc, 0.0) * w[None, :]
                    score = gl.sum(gl.reshape(terms, [64, BQ, H]), 2)  # [64, BQ]
                    mbarrier.wait(slot_empty.index(slot), (((done + t) // SLOTS) & 1) ^ 1)
                    slots.index(slot).permute((1, 0)).store(score)
                    barrier()
                    mbarrier.arrive(slot_full.index(slot), count=1)
                    # The tile's stage is free again: the next but one of this group's tiles goes there.
                    turn_there, done_there, row_there, tiles_there = _load_keys(
                        k_desc,
                        k_tiles,
                        k_full,
                        starts,
                        first_keys,
                        ahead,
                        turn_there,
                        done_there,
                        row_there,
                        tiles_there,
                        turns,
                        B,
                        S,
                        T,
                        last_slot,
                        BQ,
                        STRIDE,
                        HAS_FIRST,
                        STAGES,
                    )
                    ahead += 2
            done += tiles

    @gluon.jit
    def _kth_largest(scores, n, topk, slack, STEP: gl.constexpr, layout: gl.constexpr):
        """Of n > topk scores in memory: a value (ordered int) that `topk` to `topk + slack` reach, and how many do.

        Only ties at it let more reach it. Built bit by bit below the leading bits that all scores share.
        """
        offset = gl.arange(0, STEP, layout=layout)
        high = gl.full([STEP], -2147483648, gl.int32, layout)
        low = gl.full([STEP], 2147483647, gl.int32, layout)
        for first in range(0, n, STEP):
            valid = first + offset < n
            key = _ordered(gl.load(scores + first + offset, mask=valid, other=0.0))
            high = gl.where(valid, gl.maximum(high, key), high)
            low = gl.where(valid, gl.minimum(low, key), low)
        top = gl.max(high, 0)
        least = gl.min(low, 0)
        differ = top ^ least
        for shift in gl.static_range(5):
            differ |= (differ >> (1 << shift)) & (0x7FFFFFFF >> ((1 << shift) - 1))
        kth = gl.where(differ < 0, -2147483648, top & ~differ)
        bit = gl.where(differ < 0, -2147483648, differ - (differ >> 1))
        reach = n
        while (bit != 0) & (reach > topk + slack):
            # Adding the sign bit wraps to 0, the least ordered int that is not negative.
            trial = kth + bit
            number = gl.zeros([STEP], gl.int32, layout)
            for first in range(0, n, STEP):
                valid = first + offset < n
                key = _ordered(gl.load(scores + first + offset, mask=valid, other=float("-inf")))
                number += (valid & (key >= trial)).to(gl.int32)
            count = gl.sum(number, 0)
            kth = gl.where(count >= topk, trial, kth)
            reach = gl.where(count >= topk, count, reach)
            bit = (bit >> 1) & 0x7FFFFFFF
        return gl.maximum(kth, least), reach

    @gluon.jit
    def _float_of(key):
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(gl.float32, bitcast=True)

    @gluon.jit
    def _keep_best(
        scores,
        keys,
        n,
        topk,
        slack,
        out,
        IN_PLACE: gl.constexpr,
        layout: gl.constexpr,
    ):
        """Copy the keys of the `topk` to `topk + slack` best of n in order, to `out` or, with scores, in place.

        Returns a score that none of those left out exceeds, minus infinity when none is, and the number copied.
        """
        STEP: gl.constexpr = 1024
        offset = gl.arange(0, STEP, layout=layout)
        kth = gl.full((), -2147483648, gl.int32)
        room = n
        if n > topk:
            kth, reach = _kth_largest(scores, n, topk, slack, STEP, layout)
            if reach > topk + slack:
                above = gl.zeros([STEP], gl.int32, layout)
                for first in range(0, n, STEP):
                    valid = first + offset < n
                    key = _ordered(gl.load(scores + first + offset, mask=valid, other=float("-inf")))
                    above += (valid & (key > kth)).to(gl.int32)
                room = topk - gl.sum(above, 0)
        written = gl.full((), 0, gl.int32)
        ties = gl.full((), 0, gl.int32)
        for first in range(0, n, STEP):
            valid = first + offset < n
            score = gl.load(scores + first + offset, mask=valid, other=float("-inf"))
            entry = gl.load(keys + first + offset, mask=valid, other=0)
            key = _ordered(score)
            keep = valid & (key >= kth)
            if room < n:
                tied = valid & (key == kth)
                tie_rank = ties + gl.associative_scan(tied.to(gl.int32), 0, _add)
                keep = keep & ((key > kth) | (tie_rank <= room))
                ties += gl.sum(tied.to(gl.int32), 0)
            place = written + gl.associative_scan(keep.to(gl.int32), 0, _add) - 1
            if IN_PLACE:
                # Everything is read before anything is overwritten.
                barrier()
                gl.store(scores + place, score, mask=keep)
                gl.store(keys + place, entry, mask=keep)
            else:
                gl.store(out + place, entry, mask=keep)
            written += gl.sum(keep.to(gl.int32), 0)
        if IN_PLACE:
            barrier()
        return gl.where(n > topk, _float_of(kth), float("-inf")), written

    @gluon.jit
    def _finish_row(
        scores,
        keys,
        n,
        row_guess,
        topk,
        width,
        guesses,
        redo,
        out,
        row,
        HAS_GUESS: gl.constexpr,
        SAMPLING: gl.constexpr,
        layout: gl.constexpr,
    ):
        """Write a row's selection, or its guess."""
        if SAMPLING:
            guess = gl.full((), float("-inf"), gl.float32)
            if n > topk:
                kth, _ = _kth_largest(scores, n, topk, topk // 16, 1024, layout)
                guess = _float_of(kth)
            gl.store(guesses + row, guess)
        else:
            out += row * width
            _, written = _keep_best(scores, keys, n, topk, 0, out, False, layout)
            offset = gl.arange(0, 1024, layout=layout)
            for first in range(written // 1024 * 1024, width, 1024):
                entry = first + offset
                gl.store(out + entry, gl.full([1024], -1, gl.int32, layout), mask=(entry >= written) & (entry < width))
            if HAS_GUESS and (n < topk) & (row_guess > float("-inf")):
                gl.store(redo + row, 1)

    @gluon.jit
    def _select_group(
        q_desc,
        weights,
        starts,
        first_keys,
        mask,
        guesses,
        out,
        redo,
        list_scores,
        list_keys,
        q_tiles,
        w_tiles,
        slots,
        q_full,
        slot_full,
        slot_empty,
        turns,
        B,
        S,
        T,
        last_slot,
        topk,
        width,
        H: gl.constexpr,
        BQ: gl.constexpr,
        CAPACITY: gl.constexpr,
        STRIDE: gl.constexpr,
        HAS_FIRST: gl.constexpr,
        HAS_MASK: gl.constexpr,
        HAS_GUESS: gl.constexpr,
        SAMPLING: gl.constexpr,
        SLOTS: gl.constexpr,
        CHECK: gl.constexpr,
    ):
        lanes: gl.constexpr = 2 if BQ >= 8 else 1
        tile: gl.constexpr = gl.BlockedLayout([1, 2 * lanes], [lanes, 32 // lanes], [4, 1], [1, 0])
        line: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        row = gl.arange(0, BQ, layout=gl.SliceLayout(1, tile))
        lane = gl.arange(0, 64, layout=gl.SliceLayout(0, tile))
        program = gl.program_id(0).to(gl.int64)
        list_scores += program * (2 * BQ * CAPACITY)
        list_keys += program * (2 * BQ * CAPACITY)
        done = 0
        # The block before, whose rows are finished while this one's first tiles are scored.
        pending = BQ
        pending_row = gl.full((), 0, gl.int64)
        pending_rows = 0
        pending_lists = 0
        pending_count = gl.zeros([BQ], gl.int32, gl.SliceLayout(1, tile))
        pending_guess = gl.zeros([BQ], gl.float32, gl.SliceLayout(1, tile))
        b, first_query, begin, tiles = _block_of(0, starts, first_keys, B, S, last_slot, BQ, STRIDE, HAS_FIRST)
        _load_queries(q_desc, weights, q_tiles, w_tiles, q_full, 0, b, first_query, S, H, BQ)
        # One turn more than there are blocks, to finish the last.
        for turn in range(turns + 1):
            # All tiles of the block before last are scored: its queries' buffer is free.
            b, first_query, begin, tiles = _block_of(
                turn + 1, starts, first_keys, B, S, last_slot, BQ, STRIDE, HAS_FIRST
            )
            _load_queries(q_desc, weights, q_tiles, w_tiles, q_full, turn + 1, b, first_query, S, H, BQ)
            b, first_query, begin, tiles = _block_of(turn, starts, first_keys, B, S, last_slot, BQ, STRIDE, HAS_FIRST)
            first_row = b.to(gl.int64) * S + first_query
            lists = (turn & 1) * (BQ * CAPACITY)
            real = (first_query + row < S) & (first_query >= 0)
            start = gl.load(starts + b).to(gl.int32)
            slot = gl.minimum(start + first_query + row, last_slot) // STRIDE
            slot = gl.where(real, slot, -1)  # [BQ]
            first_slot = gl.zeros([BQ], gl.int32, gl.SliceLayout(1, tile))
            if HAS_FIRST:
                first_slot = gl.load(first_keys + first_row + row, mask=real, other=0)
                first_slot = (gl.maximum(first_slot, 0) + STRIDE - 1) // STRIDE
            bound = gl.full([BQ], float("-inf"), gl.float32, gl.SliceLayout(1, tile))
            if HAS_GUESS:
                guess = gl.load(guesses + first_row + row, mask=real, other=float("-inf"))
                bound = gl.where(slot - first_slot >= CAPACITY, guess, bound)
            first_bound = bound
            count = gl.zeros([BQ], gl.int32, gl.SliceLayout(1, tile))
            for t in range(tiles):
                at = (done + t) % SLOTS
                key = begin + t * 64 + lane  # [64]
                mbarrier.wait(slot_full.index(at), ((done + t) // SLOTS) & 1)
                score = slots.index(at).load(tile)  # [BQ, 64]
                barrier()
                mbarrier.arrive(slot_empty.index(at), count=1)
                keep = (score > bound[:, None]) & (key[None, :] <= slot[:, None])
                if HAS_FIRST:
                    keep = keep & (key[None, :] >= first_slot[:, None])
                if HAS_MASK:
                    allowed = gl.load(mask + b.to(gl.int64) * T + key, mask=key < T, other=0)
                    keep = keep & (allowed != 0)[None, :]
                number = keep.to(gl.int32)
                rank = gl.associative_scan(number, 1, _add)
                place = lists + (row * CAPACITY + count - 1)[:, None] + rank
                gl.store(list_scores + place, score, mask=keep)
                gl.store(list_keys + place, key[None, :] + gl.zeros_like(rank), mask=keep)
                count += gl.sum(number, 1)
                if t % CHECK == CHECK - 1:  # noqa: SIM102
                    if gl.max(count, 0) > CAPACITY - CHECK * 64:
                        barrier()
                        for i in range(BQ):
                            n = gl.sum(gl.where(row == i, count, 0), 0)
                            if n > topk:
                                at_i = lists + i * CAPACITY
                                kth, kept = _keep_best(
                                    list_scores + at_i, list_keys + at_i, n, topk, topk // 8, out, True, line
                                )
                                bound = gl.where(row == i, kth, bound)
                                count = gl.where(row == i, kept, count)
                if (t % 8 == 7) & (pending < pending_rows):
                    n = gl.sum(gl.where(row == pending, pending_count, 0), 0)
                    row_guess = gl.max(gl.where(row == pending, pending_guess, float("-inf")), 0)
                    at_i = pending_lists + pending * CAPACITY
                    _finish_row(
                        list_scores + at_i,
                        list_keys + at_i,
                        n,
                        row_guess,
                        topk,
                        width,
                        guesses,
                        redo,
                        out,
                        pending_row + pending,
                        HAS_GUESS,
                        SAMPLING,
                        line,
                    )
                    pending += 1
            barrier()
            for i in range(pending, pending_rows):
                n = gl.sum(gl.where(row == i, pending_count, 0), 0)
                row_guess = gl.max(gl.where(row == i, pending_guess, float("-inf")), 0)
                at_i = pending_lists + i * CAPACITY
                _finish_row(
                    list_scores + at_i,
                    list_keys + at_i,
                    n,
                    row_guess,
                    topk,
                    width,
                    guesses,
                    redo,
                    out,
                    pending_row + i,
                    HAS_GUESS,
                    SAMPLING,
                    line,
                )
            pending = 0
            pending_rows = gl.where(first_query >= 0, gl.minimum(BQ, S - first_query), 0)
            pending_row = first_row
            pending_lists = lists
            pending_count = count
            pending_guess = first_bound
            done += tiles

    @gluon.jit(do_not_specialize=["B", "S", "T", "last_slot", "topk", "width"])
    def lightning_indexer_hopper_kernel(
        q_desc,
        k_desc,
        weights,
        starts,
        first_keys,
        mask,
        guesses,
        out,
        redo,
        list_scores,
        list_keys,
        B,
        S,
        T,
        last_slot,
        topk,
        width,
        H: gl.constexpr,
        BQ: gl.constexpr,
        CAPACITY: gl.constexpr,
        STRIDE: gl.constexpr,
        HAS_FIRST: gl.constexpr,
        HAS_MASK: gl.constexpr,
        HAS_GUESS: gl.constexpr,
        SAMPLING: gl.constexpr,
        STAGES: gl.constexpr,
        SLOTS: gl.constexpr,
        CHECK: gl.constexpr,
    ):
        """Scores and selection of whole query blocks, or with SAMPLING the guesses, as the head of this file tells."""
        D: gl.constexpr = k_desc.block_type.shape[1]
        q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, BQ * H, D], q_desc.layout)
        k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 64, D], k_desc.layout)
        w_tiles = gl.allocate_shared_memory(gl.float32, [2, BQ * H], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        slots = gl.allocate_shared_memory(gl.float32, [SLOTS, BQ, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        my_turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        slot_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        slot_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            # One arrival with the queries' bytes, one when the weights are written.
            mbarrier.init(q_full.index(i), count=2)
            mbarrier.init(my_turn.index(i), count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=1)
        for i in gl.static_range(SLOTS):
            mbarrier.init(slot_full.index(i), count=1)
            mbarrier.init(slot_empty.index(i), count=1)
        barrier()
        blocks = (S + BQ - 1) // BQ * B
        turns = (blocks + gl.num_programs(0) - 1) // gl.num_programs(0)
        gl.warp_specialize(
            [
                (
                    _select_group,
                    (
                        q_desc,
                        weights,
                        starts,
                        first_keys,
                        mask,
                        guesses,
                        out,
                        redo,
                        list_scores,
                        list_keys,
                        q_tiles,
                        w_tiles,
                        slots,
                        q_full,
                        slot_full,
                        slot_empty,
                        turns,
                        B,
                        S,
                        T,
                        last_slot,
                        topk,
                        width,
                        H,
                        BQ,
                        CAPACITY,
                        STRIDE,
                        HAS_FIRST,
                        HAS_MASK,
                        HAS_GUESS,
                        SAMPLING,
                        SLOTS,
                        CHECK,
                    ),
                ),
                (
                    _score_group,
                    (
                        0,
                        k_desc,
                        starts,
                        first_keys,
                        q_tiles,
                        w_tiles,
                        k_tiles,
                        slots,
                        q_full,
                        k_full,
                        slot_full,
                        slot_empty,
                        my_turn,
                        turns,
                        B,
                        S,
                        T,
                        last_slot,
                        H,
                        BQ,
                        STRIDE,
                        HAS_FIRST,
                        STAGES,
                        SLOTS,
                    ),
                ),
                (
                    _score_group,
                    (
                        1,
                        k_desc,
                        starts,
                        first_keys,
                        q_tiles,
                        w_tiles,
                        k_tiles,
                        slots,
                        q_full,
                        k_full,
                        slot_full,
                        slot_empty,
                        my_turn,
                        turns,
                        B,
                        S,
                        T,
                        last_slot,
                        H,
                        BQ,
                        STRIDE,
                        HAS_FIRST,
                        STAGES,
                        SLOTS,
                    ),
                ),
            ],
            [4, 4],
            [200, 200],
        )
