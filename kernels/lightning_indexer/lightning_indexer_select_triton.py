"""Exact top-k on candidate lists: device functions shared by the lightning indexer's prefill and decode kernels.

A row's *list* holds (score, key) pairs in ascending key order, a score's bits above its key in one int64, and has
room for CAP of them. Every key appended later has a larger index, so a later score that only equals the k-th best so
far can never be selected: `score > bound` loses nothing, and a list cut to its best keeps ties with the smaller index.
NaN is above no bound, not even minus infinity, and so never in a list.

Legend: BQ rows, CAP entries of a list.
"""

from __future__ import annotations

from ..common.kernel_constants import GREATEST_INT, LEAST_INT
from ..common.triton_support import tl, triton

if triton is not None:
    _LEAST, _GREATEST = tl.constexpr(LEAST_INT), tl.constexpr(GREATEST_INT)
    # Entries that a program of 128 threads copies at once, and that it fills.
    _COPIED, _FILLED = tl.constexpr(2048), tl.constexpr(1024)

    @triton.jit
    def ordered_int(x):
        """int32 that sorts like the fp32 `x`; -0.0 and 0.0 are equal."""
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def float_of_ordered(key):
        """The inverse of `ordered_int`."""
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    @triton.jit
    def bits_set(x):
        """How many bits of the int32 `x` are set."""
        x = x.to(tl.uint32, bitcast=True)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return ((x * 0x01010101) >> 24).to(tl.int32)

    @triton.jit
    def kth_largest(key, topk, slack):
        """A value that at least `topk` of the int32 `key` reach, and how many do: at most `topk + slack`.

        Entries that hold the least int32 do not count. The value is one of `key`, the `topk`-th largest if
        `slack` is 0. Only ties at it let more reach it. Built bit by bit below the leading bits that all keys share.
        """
        high = tl.max(key)
        low = tl.min(tl.where(key > _LEAST, key, _GREATEST))
        differ = high ^ low
        for shift in tl.static_range(5):
            differ |= (differ >> (1 << shift)) & (0x7FFFFFFF >> ((1 << shift) - 1))
        kth = tl.where(differ < 0, _LEAST, high & ~differ)
        bit = bits_set(differ) - 1
        reach = tl.sum((key > _LEAST).to(tl.int32))
        while (bit >= 0) & (reach > topk + slack):
            trial = kth + (tl.full((), 1, tl.int32) << bit)
            count = tl.sum((key >= trial).to(tl.int32))
            kth = tl.where(count >= topk, trial, kth)
            reach = tl.where(count >= topk, count, reach)
            bit -= 1
        return tl.min(tl.where(key >= tl.maximum(kth, _LEAST + 1), key, _GREATEST)), reach

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
        """An entry of a list: the score's bits above the key."""
        return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | key.to(tl.int64)

    @triton.jit
    def score_of(pair):
        """The score of a list's entry."""
        return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)

    @triton.jit
    def keep_best(list_pairs, count, topk, slack, out, CAP: tl.constexpr, KEYS_ONLY: tl.constexpr):
        """Copy the `topk` to `topk + slack` best of a list of `count` pairs in order, as pairs or as int32 keys.

        `out` may be the list itself. Returns a score that none of the others exceeds, minus infinity when nothing had
        to be dropped, and the number copied.
        """
        kth = tl.full((), _LEAST, tl.int32)
        room = count
        if count > topk:
            # count >> 24 is 0, which the compiler does not know: else it keeps what follows from it over the loops
            # around, and spills.
            entry = tl.arange(0, CAP) + (count >> 24)
            valid = entry < count
            key = ordered_int(score_of(tl.load(list_pairs + entry, mask=valid, other=0)))
            key = tl.where(valid, key, _LEAST)
            kth, reach = kth_largest(key, topk, slack)
            if reach > topk + slack:
                room = topk - tl.sum((key > kth).to(tl.int32))
        written = tl.full((), 0, tl.int32)
        ties = tl.full((), 0, tl.int32)
        for first in tl.range(0, count, _COPIED, num_stages=1):
            entry = first + tl.arange(0, _COPIED) + (count >> 24)
            valid = entry < count
            pair = tl.load(list_pairs + entry, mask=valid, other=0)
            key = ordered_int(score_of(pair))
            keep = valid & (key >= kth)
            if room < count:
                tied = valid & (key == kth)
                tie_rank = ties + tl.cumsum(tied.to(tl.int32), 0)
                keep = keep & ((key > kth) | (tie_rank <= room))
                ties += tl.sum(tied.to(tl.int32))
            place = written + tl.cumsum(keep.to(tl.int32), 0) - 1
            # The copy may be in place: everything is read before anything is overwritten.
            tl.debug_barrier()
            if KEYS_ONLY:
                tl.store(out + place, pair.to(tl.int32), mask=keep)
            else:
                tl.store(out + place, pair, mask=keep)
            written += tl.sum(keep.to(tl.int32))
        tl.debug_barrier()
        return tl.where(count > topk, float_of_ordered(kth), float("-inf")), written

    @triton.jit
    def fill_rest(out, count, width):
        """Write -1 to `out[count:width]`."""
        for first in tl.range(0, width, _FILLED, num_stages=1):
            entry = first + tl.arange(0, _FILLED) + (count >> 24)
            tl.store(out + entry, tl.full([_FILLED], -1, tl.int32), mask=(entry >= count) & (entry < width))

else:  # Without triton the kernels that call these do not exist either; importing their names must work.
    ordered_int = float_of_ordered = bits_set = kth_largest = append_above = pair_of = score_of = keep_best = None
    fill_rest = None
