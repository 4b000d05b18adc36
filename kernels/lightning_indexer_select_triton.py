"""Exact top-k on candidate lists: device functions shared by the lightning indexer's prefill and decode kernels.

A row's *list* holds (score, key) pairs in ascending key order, a score's bits above its key in one int64, and has room
for CAP of them. Every key appended later has a larger index, so a later score that only equals the k-th best so far can never be selected: `score > bound`
loses nothing, and a list cut to its `topk` best keeps ties with the smaller index.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def ordered_int(x):
        """int32 that sorts like the fp32 `x`; -0.0 and 0.0 are equal."""
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def float_of_ordered(key):
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    @triton.jit
    def kth_largest(key, topk):
        """The `topk`-th largest of the int32 tensor `key` (at least `topk` entries), bit by bit from the top."""
        kth = tl.full((), -2147483648, tl.int32)
        bit = tl.full((), 31, tl.int32)
        at_least = topk + 1
        while (bit >= 0) & (at_least != topk):
            trial = kth + (tl.full((), 1, tl.int32) << bit)
            count = tl.sum((key >= trial).to(tl.int32))
            kth = tl.where(count >= topk, trial, kth)
            at_least = tl.where(count >= topk, count, at_least)
            bit -= 1
        return tl.min(tl.where(key >= kth, key, 2147483647))

    @triton.jit
    def append_above(score, seen, key, bound, count, lists, CAP: tl.constexpr):
        """Append the seen keys whose score is above their row's bound; returns the rows' new counts.

        `score`, `seen` [BQ, FK], `key` [FK], `bound`, `count` [BQ]; row i of the lists starts at `i * CAP`.
        """
        keep = seen & (score > bound[:, None])  # [BQ, FK]
        rank = tl.cumsum(keep.to(tl.int32), 1)
        row = tl.arange(0, bound.shape[0])
        place = (row * CAP + count - 1)[:, None] + rank
        tl.store(lists + place, pair_of(score, key[None, :]), mask=keep)
        return count + tl.sum(keep.to(tl.int32), 1)

    @triton.jit
    def pair_of(score, key):
        return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | key.to(tl.int64)

    @triton.jit
    def score_of(pair):
        return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)

    @triton.jit
    def keep_best(list_pairs, count, topk, out, CAP: tl.constexpr, STEP: tl.constexpr, KEYS_ONLY: tl.constexpr):
        """Copy the `topk` best of a list of `count` pairs in order: the pairs (onto itself too) or their keys, int32.

        Returns the score of the `topk`-th, or minus infinity when nothing had to be dropped.
        """
        kth = tl.full((), -2147483648, tl.int32)
        room = tl.full((), 0, tl.int32)
        if count > topk:
            entry = tl.arange(0, CAP)
            score = score_of(tl.load(list_pairs + entry, mask=entry < count, other=0))
            key = tl.where(entry < count, ordered_int(score), -2147483648)
            kth = kth_largest(key, topk)
            room = topk - tl.sum((key > kth).to(tl.int32))
        written = tl.full((), 0, tl.int32)
        ties = tl.full((), 0, tl.int32)
        for first in tl.range(0, count, STEP, num_stages=1):
            entry = first + tl.arange(0, STEP)
            valid = entry < count
            pair = tl.load(list_pairs + entry, mask=valid, other=0)
            key = ordered_int(score_of(pair))
            tied = valid & (key == kth)
            tie_rank = ties + tl.cumsum(tied.to(tl.int32), 0)
            keep = valid & ((key > kth) | (tied & (tie_rank <= room)))
            place = written + tl.cumsum(keep.to(tl.int32), 0) - 1
            # The copy may be in place: everything is read before anything is overwritten.
            tl.debug_barrier()
            if KEYS_ONLY:
                tl.store(out + place, pair.to(tl.int32), mask=keep)
            else:
                tl.store(out + place, pair, mask=keep)
            written += tl.sum(keep.to(tl.int32))
            ties += tl.sum(tied.to(tl.int32))
        tl.debug_barrier()
        return tl.where(count > topk, float_of_ordered(kth), float("-inf"))

    @triton.jit
    def fill_rest(out, count, width, STEP: tl.constexpr):
        """Write -1 to `out[count:width]`."""
        for first in tl.range(0, width, STEP, num_stages=1):
            entry = first + tl.arange(0, STEP)
            tl.store(out + entry, tl.full([STEP], -1, tl.int32), mask=(entry >= count) & (entry < width))

else:  # Without triton the kernels that call these do not exist either; importing their names must work.
    ordered_int = float_of_ordered = kth_largest = append_above = keep_best = fill_rest = None
