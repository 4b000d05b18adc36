"""Exact top-k on candidate lists: device functions shared by the lightning indexer's prefill and decode kernels.

A row's *list* holds (score, key) pairs in ascending key order and has room for CAP of them. Every key appended later
has a larger index, so a later score that only equals the k-th best so far can never be selected: `score > bound`
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
    def append_above(
        score, seen, keys, bound, count, list_scores, list_keys, CAP: tl.constexpr, WITH_SCORES: tl.constexpr
    ):
        """Append the seen keys whose score is above their row's bound; returns the rows' new counts.

        `score`, `seen` [FK, BQ], `keys` [FK], `bound`, `count` [BQ]; row i of the lists starts at `i * CAP`.
        """
        keep = seen & (score > bound[None, :])  # [FK, BQ]
        rank = tl.cumsum(keep.to(tl.int32), 0)
        row = tl.arange(0, bound.shape[0])
        place = row[None, :] * CAP + count[None, :] + rank - 1
        tl.store(list_keys + place, tl.broadcast_to(keys[:, None], place.shape), mask=keep)
        if WITH_SCORES:
            tl.store(list_scores + place, score, mask=keep)
        return count + tl.sum(keep.to(tl.int32), 0)

    @triton.jit
    def keep_best(
        list_scores,
        list_keys,
        count,
        topk,
        to_scores,
        to_keys,
        CAP: tl.constexpr,
        STEP: tl.constexpr,
        WITH_SCORES: tl.constexpr,
    ):
        """Copy the `topk` best of a list of `count` pairs, in order, to another place or onto itself.

        Returns the score of the `topk`-th, or minus infinity when nothing had to be dropped.
        """
        kth = tl.full((), -2147483648, tl.int32)
        room = tl.full((), 0, tl.int32)
        if count > topk:
            entry = tl.arange(0, CAP)
            key = ordered_int(tl.load(list_scores + entry, mask=entry < count, other=float("-inf")))
            kth = kth_largest(key, topk)
            room = topk - tl.sum((key > kth).to(tl.int32))
        written = tl.full((), 0, tl.int32)
        ties = tl.full((), 0, tl.int32)
        for first in tl.range(0, count, STEP, num_stages=1):
            entry = first + tl.arange(0, STEP)
            valid = entry < count
            score = tl.load(list_scores + entry, mask=valid, other=float("-inf"))
            index = tl.load(list_keys + entry, mask=valid, other=0)
            key = ordered_int(score)
            tied = valid & (key == kth)
            tie_rank = ties + tl.cumsum(tied.to(tl.int32), 0)
            keep = valid & ((key > kth) | (tied & (tie_rank <= room)))
            place = written + tl.cumsum(keep.to(tl.int32), 0) - 1
            # The copy may be in place: everything is read before anything is overwritten.
            tl.debug_barrier()
            tl.store(to_keys + place, index, mask=keep)
            if WITH_SCORES:
                tl.store(to_scores + place, score, mask=keep)
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
