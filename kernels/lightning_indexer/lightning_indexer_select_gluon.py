"""Exact top-k on candidate lists in Gluon, for the lightning indexer's Hopper kernel.

A list holds the bits of fp32 scores and, CAPACITY entries further on, their int32 keys in ascending order. As in
`lightning_indexer_select_triton.py`, keys appended later are larger, so that ties go to the smaller key.

Legend: as `lightning_indexer_hopper_gluon.py`.
"""

from __future__ import annotations

from ..common.gluon_support import barrier, gl, gluon, mbarrier
from ..common.kernel_constants import GREATEST_INT, LEAST_INT
from .lightning_indexer_blocks_gluon import TILE, begin_block, block_number, block_of, is_kept, load_queries

# Entries behind a list's scores and keys: what is known of it (a multiple of 4 keeps rows aligned).
LIST_EXTRA = 16

if gluon is not None:
    _LEAST, _GREATEST = gl.constexpr(LEAST_INT), gl.constexpr(GREATEST_INT)
    _LIST_EXTRA = gl.constexpr(LIST_EXTRA)
    # Entries that a program of 128 threads holds at once where it has many registers, and where it has few.
    MANY, FEW = gl.constexpr(2048), gl.constexpr(1024)

    @gluon.jit
    def add(a, b):
        """Of a scan."""
        return a + b

    @gluon.jit
    def halfway(inside, beyond):
        """The middle of two int32, whose sum may be none."""
        return (inside >> 1) + (beyond >> 1) + (inside & beyond & 1)

    @gluon.jit
    def ordered_int(x):
        """int32 that sorts like the fp32 `x`; -0.0 and 0.0 are equal."""
        bits = gl.where(x == 0.0, 0.0, x).to(gl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @gluon.jit
    def _load_ordered(scores, first, n, offset):
        """The ordered ints of scores of a list of n, the least int behind its end.

        Loads are masked by fours, so that four entries are one load.
        """
        key = ordered_int(gl.load(scores + first + offset, mask=first + offset // 4 * 4 < n, other=0.0))
        return gl.where(first + offset < n, key, _LEAST)

    @gluon.jit
    def _unless(missing, key, instead: gl.constexpr):
        return gl.where(missing, instead, key)

    @gluon.jit
    def _start_search(n, topk, slack):
        """Goal, `over`, `under`, turn and `moved` (see `_move_end`) of a search among n scores.

        `topk` to `topk + slack` of them are wanted.
        """
        goal = gl.log2((topk + slack // 2).to(gl.float32) + 0.5)
        over = gl.log2(n.to(gl.float32)) - goal
        return goal, over, -1.0 - goal, gl.full((), 0, gl.int32), gl.full((), 0, gl.int32)

    @gluon.jit
    def _interpolated(inside, beyond, over, under):
        low_score = float_of_ordered(inside)
        return ordered_int(low_score + (float_of_ordered(beyond) - low_score) * (over / (over - under)))

    @gluon.jit
    def _move_end(trial, count, topk, goal, inside, beyond, reach, over, under, moved):
        """Move one end of a search to a trial that `count` reach: `inside` if at least `topk`, else `beyond`.

        `over` and `under` are how far the logarithm of the count is from the goal at either end; an end that stays
        twice pulls half as much (the Illinois rule). `moved`: 1 when the last trial moved `inside`, 2 when `beyond`.
        """
        distance = gl.log2(gl.maximum(count.to(gl.float32), 0.5)) - goal
        if count >= topk:
            inside = trial
            reach = count
            over = distance
            under = gl.where(moved == 1, 0.5 * under, under)
            moved = gl.full((), 1, gl.int32)
        else:
            beyond = trial
            under = distance
            over = gl.where(moved == 2, 0.5 * over, over)
            moved = gl.full((), 2, gl.int32)
        return inside, beyond, reach, over, under, moved

    @gluon.jit
    def kth_largest_of_list(scores, n, topk, CAPACITY: gl.constexpr, layout: gl.constexpr):
        """Of n > topk scores in memory: a value (ordered int) that `topk` reach, and how many do.

        Only ties at it let more reach it. Found by interpolation.
        """
        gl.static_assert(CAPACITY == 2 * MANY or CAPACITY == 3 * MANY)
        # n >> 24 is 0, which the compiler does not know: else it keeps what follows from it over the loops around
        # this search, and spills.
        offset = gl.arange(0, MANY, layout=layout) + (n >> 24) * 4
        key0 = _load_ordered(scores, 0, n, offset)
        key1 = _load_ordered(scores, MANY, n, offset)
        key2 = key1
        high = gl.maximum(key0, key1)
        low = gl.minimum(_unless(offset >= n, key0, _GREATEST), _unless(MANY + offset >= n, key1, _GREATEST))
        if CAPACITY == 3 * MANY:
            key2 = _load_ordered(scores, 2 * MANY, n, offset)
            high = gl.maximum(high, key2)
            low = gl.minimum(low, _unless(2 * MANY + offset >= n, key2, _GREATEST))
        top = gl.max(high, 0)
        least = gl.min(low, 0)
        # `inside` is reached by at least topk, `beyond` by fewer. Near the top scores thin out exponentially, so the
        # logarithm of their count falls evenly.
        inside = least
        beyond = top + 1
        reach = n
        goal, over, under, turn, moved = _start_search(n, topk, 0)
        while (reach > topk) & (inside < beyond - 1):
            trial = _interpolated(inside, beyond, over, under)
            if turn % 6 == 5:
                # Ties or gaps may defeat interpolation: draw both ends up to scores there are, and halve.
                high = _unless(key0 >= beyond, key0, _LEAST)
                high = gl.maximum(high, _unless(key1 >= beyond, key1, _LEAST))
                low = _unless(key0 < inside, key0, _GREATEST)
                low = gl.minimum(low, _unless(key1 < inside, key1, _GREATEST))
                if CAPACITY == 3 * MANY:
                    high = gl.maximum(high, _unless(key2 >= beyond, key2, _LEAST))
                    low = gl.minimum(low, _unless(key2 < inside, key2, _GREATEST))
                inside = gl.min(low, 0)
                beyond = gl.max(high, 0) + 1
                trial = halfway(inside, beyond)
            trial = gl.maximum(gl.minimum(trial, beyond - 1), inside + 1)
            number = (key0 >= trial).to(gl.int32) + (key1 >= trial).to(gl.int32)
            if CAPACITY == 3 * MANY:
                number += (key2 >= trial).to(gl.int32)
            count = gl.sum(number, 0)
            inside, beyond, reach, over, under, moved = _move_end(
                trial, count, topk, goal, inside, beyond, reach, over, under, moved
            )
            turn += 1
        return inside, reach

    @gluon.jit
    def _reach(scores, n, trial, layout: gl.constexpr):
        """How many of a list of n reach `trial`."""
        offset = gl.arange(0, FEW, layout=layout)
        number = gl.zeros([FEW], gl.int32, layout)
        for first in range(0, n, FEW):
            number += (_load_ordered(scores, first, n, offset) >= trial).to(gl.int32)
        return gl.sum(number, 0)

    @gluon.jit
    def bound_of_full_list(list_i, n, topk, slack, layout: gl.constexpr):
        """As `bound_of_list` of n > topk, with few registers: the list is read again for every trial.

        `slack` more than topk may be kept.
        """
        scores = list_i.to(gl.pointer_type(gl.float32), bitcast=True)
        offset = gl.arange(0, FEW, layout=layout)
        top = gl.full((), _LEAST, gl.int32)
        least = gl.full((), _GREATEST, gl.int32)
        for first in range(0, n, FEW):
            key = _load_ordered(scores, first, n, offset)
            top = gl.maximum(top, gl.max(key, 0))
            least = gl.minimum(least, gl.min(_unless(first + offset >= n, key, _GREATEST), 0))
        inside = least
        beyond = top + 1
        reach = n
        goal, over, under, turn, moved = _start_search(n, topk, slack)
        while (reach > topk + slack) & (inside < beyond - 1):
            trial = _interpolated(inside, beyond, over, under)
            # Ties or gaps may defeat interpolation.
            trial = gl.where(turn % 4 == 3, halfway(inside, beyond), trial)
            trial = gl.maximum(gl.minimum(trial, beyond - 1), inside + 1)
            count = _reach(scores, n, trial, layout)
            inside, beyond, reach, over, under, moved = _move_end(
                trial, count, topk, goal, inside, beyond, reach, over, under, moved
            )
            turn += 1
        room = n
        if reach > topk + slack:
            room = topk - _reach(scores, n, inside + 1, layout)
        return inside, room

    @gluon.jit
    def load_scores(buffers, bars, pair, layout: gl.constexpr, form: gl.constexpr):
        """The scores of a pair of tiles, as four `[BQ, 32]`, once they are there; their slot is free then."""
        slots, at = buffers.scores, pair % form.SLOTS
        mbarrier.wait(bars.slot_full.index(at), (pair // form.SLOTS) & 1)
        scores = (
            slots.index(2 * at).slice(0, 32, dim=1).load(layout),
            slots.index(2 * at).slice(32, 32, dim=1).load(layout),
            slots.index(2 * at + 1).slice(0, 32, dim=1).load(layout),
            slots.index(2 * at + 1).slice(32, 32, dim=1).load(layout),
        )
        barrier()
        mbarrier.arrive(bars.slot_empty.index(at), count=1)
        return scores

    @gluon.jit
    def rank_in_warp(keep):
        """For rows of 32 that lie across a warp: how many are kept to the left of each entry, and in its row."""
        return gl.inline_asm_elementwise(
            """{
            .reg .pred kept;
            .reg .b32 all, left;
            setp.ne.s32 kept, $2, 0;
            vote.sync.ballot.b32 all, kept, 0xffffffff;
            mov.u32 left, %lanemask_lt;
            and.b32 left, left, all;
            popc.b32 $0, left;
            popc.b32 $1, all;
            }""",
            "=r,=r,r",
            [keep.to(gl.int32)],
            dtype=(gl.int32, gl.int32),
            is_pure=False,
            pack=1,
        )

    @gluon.jit
    def float_of_ordered(key):
        """The inverse of `ordered_int`."""
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(gl.float32, bitcast=True)

    @gluon.jit
    def bound_of_list(list_i, n, topk, CAPACITY: gl.constexpr, layout: gl.constexpr):
        """What `copy_best` needs: the k-th best (ordered int) of a list of n, and how many equal to it may be copied.

        Where all are kept, these are the least int and n.
        """
        kth = gl.full((), _LEAST, gl.int32)
        room = n
        if n > topk:
            scores = list_i.to(gl.pointer_type(gl.float32), bitcast=True)
            kth, reach = kth_largest_of_list(scores, n, topk, CAPACITY, layout)
            if reach > topk:
                offset = gl.arange(0, FEW, layout=layout)
                above = gl.zeros([FEW], gl.int32, layout)
                for first in range(0, n, FEW):
                    above += (_load_ordered(scores, first, n, offset) > kth).to(gl.int32)
                room = topk - gl.sum(above, 0)
        return kth, room

    @gluon.jit
    def copy_best(list_i, n, kth, room, out, IN_PLACE: gl.constexpr, CAPACITY: gl.constexpr, layout: gl.constexpr):
        """Copy the keys of the entries that reach `kth` in order, to `out` or, with scores, in place.

        Of those that equal it only the first `room`. Returns how many were copied.
        """
        # In place, beside the scores' groups, with few registers.
        STEP: gl.constexpr = FEW if IN_PLACE else MANY
        scores = list_i.to(gl.pointer_type(gl.float32), bitcast=True)
        offset = gl.arange(0, STEP, layout=layout) + (n >> 24) * 4
        written = gl.full((), 0, gl.int32)
        ties = gl.full((), 0, gl.int32)
        for first in range(0, n, STEP):
            valid = first + offset < n
            loaded = first + offset // 4 * 4 < n
            score = gl.load(scores + first + offset, mask=loaded, other=0.0)
            entry = gl.load(list_i + CAPACITY + first + offset, mask=loaded, other=0)
            key = ordered_int(score)
            keep = valid & (key >= kth)
            if room < n:
                tied = valid & (key == kth)
                tie_rank = ties + gl.associative_scan(tied.to(gl.int32), 0, add)
                keep = keep & ((key > kth) | (tie_rank <= room))
                ties += gl.sum(tied.to(gl.int32), 0)
            place = written + gl.associative_scan(keep.to(gl.int32), 0, add) - 1
            if IN_PLACE:
                # Everything is read before anything is overwritten.
                barrier()
                gl.store(scores + place, score, mask=keep)
                gl.store(list_i + CAPACITY + place, entry, mask=keep)
            else:
                gl.store(out + place, entry, mask=keep)
            written += gl.sum(keep.to(gl.int32), 0)
        if IN_PLACE:
            barrier()
        return written

    @gluon.jit
    def write_row(
        list_i,
        kth,
        room,
        topk,
        width,
        redo,
        out,
        row,
        HAS_GUESS: gl.constexpr,
        CAPACITY: gl.constexpr,
        layout: gl.constexpr,
    ):
        """Write a row's selection, and whether its guess was too high."""
        n = gl.load(list_i + 2 * CAPACITY)
        out += row.to(gl.int64) * width
        written = copy_best(list_i, n, kth, room, out, False, CAPACITY, layout)
        offset = gl.arange(0, FEW, layout=layout)
        for first in range(written // FEW * FEW, width, FEW):
            entry = first + offset
            gl.store(out + entry, gl.full([FEW], -1, gl.int32, layout), mask=(entry >= written) & (entry < width))
        if HAS_GUESS and (n < topk) & (gl.load(list_i + 2 * CAPACITY + 1) != 0):
            gl.store(redo + row, 1)

    @gluon.jit(do_not_specialize=["B", "S", "topk", "width", "first_block"])
    def finish_rows_kernel(
        lists,
        out,
        redo,
        B,
        S,
        topk,
        width,
        first_block,
        BQ: gl.constexpr,
        CAPACITY: gl.constexpr,
        ROW: gl.constexpr,
        HAS_GUESS: gl.constexpr,
    ):
        """Write the selection of a row: one of BQ queries of one of the blocks from `first_block` on.

        `lists`: ROW int32 for each, as the Hopper kernel fills them.
        """
        line: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
        place = gl.program_id(0)
        block = first_block + place // BQ
        first_query = ((S + BQ - 1) // BQ - 1 - block // B) * BQ
        query = first_query + place % BQ
        if (first_query >= 0) & (query < S):
            list_i = lists + place.to(gl.int64) * ROW
            kth, room = bound_of_list(list_i, gl.load(list_i + 2 * CAPACITY), topk, CAPACITY, line)
            row = block % B * S + query
            write_row(list_i, kth, room, topk, width, redo, out, row, HAS_GUESS, CAPACITY, line)

    @gluon.jit
    def select_group(q_desc, weights, rows, mask, guesses, out, lists, buffers, bars, sizes, topk, form: gl.constexpr):
        """The third warp group: appends what passes to the rows' lists, and cuts a list that is full."""
        turns, first_turn, B, S, T, last_slot = sizes
        BQ: gl.constexpr = form.BQ
        CAPACITY: gl.constexpr = form.CAPACITY
        # A warp's lanes are 32 neighbouring keys of one query.
        tile: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        by_row: gl.constexpr = gl.SliceLayout(1, tile)
        line: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        row = gl.arange(0, BQ, layout=by_row)
        lane = gl.arange(0, 32, layout=gl.SliceLayout(0, tile))
        ROW: gl.constexpr = 2 * CAPACITY + _LIST_EXTRA
        done = gl.full((), 0, gl.int32)
        b, first_query, begin, tiles = block_of(0, rows, sizes, form)
        load_queries(q_desc, weights, buffers, bars, 0, b, first_query, S, form)
        for turn in range(turns):
            b, first_query, begin, tiles = begin_block(turn, q_desc, weights, rows, buffers, bars, sizes, form)
            first_row = b.to(gl.int64) * S + first_query
            place = block_number(first_turn + turn) - first_turn * gl.num_programs(0)
            block_lists = lists + place.to(gl.int64) * (BQ * ROW)
            real = (first_query + row < S) & (first_query >= 0)
            slot = gl.minimum(gl.load(rows.starts + b).to(gl.int32) + first_query + row, last_slot)
            slot = gl.where(real, slot, -1)  # [BQ]
            first_slot = gl.zeros([BQ], gl.int32, by_row)
            if form.HAS_FIRST:
                first_slot = gl.load(rows.first_keys + first_row + row, mask=real, other=0)
                first_slot = gl.maximum(first_slot, 0)
            bound = gl.full([BQ], float("-inf"), gl.float32, by_row)
            if form.HAS_GUESS:
                guess = gl.load(guesses + first_row + row, mask=real, other=float("-inf"))
                bound = gl.where(slot - first_slot >= CAPACITY, guess, bound)
            row_lists = block_lists + row * ROW  # [BQ]
            gl.store(row_lists + (2 * CAPACITY + 1), (bound > float("-inf")).to(gl.int32))
            count = gl.zeros([BQ, 32], gl.int32, tile)
            for t in range(0, tiles, 2):
                pair = (done + t) // 2
                scores = load_scores(buffers, bars, pair, tile, form)
                for side in gl.static_range(4):
                    score = scores[side]
                    key = begin + t * TILE + side * 32 + lane  # [32]
                    keep = is_kept(score, bound, key, slot, first_slot, mask, b, T, form)
                    rank, number = rank_in_warp(keep)
                    entry = row_lists[:, None] + (count + rank)
                    gl.store(entry, score.to(gl.int32, bitcast=True), mask=keep)
                    gl.store(entry + CAPACITY, key[None, :] + gl.zeros_like(rank), mask=keep)
                    count += number
                if t % form.CHECK == form.CHECK - 2:  # noqa: SIM102
                    if gl.max(gl.max(count, 1), 0) > CAPACITY - form.CHECK * TILE:
                        barrier()
                        counts = gl.max(count, 1)
                        for i in range(BQ):
                            n = gl.sum(gl.where(row == i, counts, 0), 0)
                            if n > topk:
                                list_i = block_lists + i * ROW
                                cut, cut_room = bound_of_full_list(list_i, n, topk, topk // 8, line)
                                kept = copy_best(list_i, n, cut, cut_room, out, True, CAPACITY, line)
                                bound = gl.where(row == i, float_of_ordered(cut), bound)
                                counts = gl.where(row == i, kept, counts)
                        count = counts[:, None] + gl.zeros([BQ, 32], gl.int32, tile)
            gl.store(row_lists + 2 * CAPACITY, gl.max(count, 1))
            done += tiles

else:  # Without Gluon the kernel that calls these does not exist either; importing their names must work.
    add = finish_rows_kernel = float_of_ordered = halfway = load_scores = ordered_int = rank_in_warp = None
    select_group = None
