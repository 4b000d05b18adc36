"""A guess of each query's bound from a sample of its keys, for the lightning indexer's Hopper kernel, in Gluon.

The selector of a sampling pass: it appends scores above a row's bound to the row's list, cuts the lists of a block
together when one fills, and at the block's end writes for each row a score that about `rank` of the sample reach. A
warp holds whole rows, so that nothing here waits for another warp but for a full list.

Legend: as `lightning_indexer_hopper_gluon.py`.
"""

from __future__ import annotations

from ..common.gluon_support import barrier, gl, gluon
from ..common.kernel_constants import GREATEST_INT, LEAST_INT
from .lightning_indexer_blocks_gluon import (
    TILE,
    begin_block,
    block_of,
    first_in_sample,
    is_kept,
    load_queries,
)
from .lightning_indexer_select_gluon import (
    add,
    float_of_ordered,
    halfway,
    load_scores,
    ordered_int,
    rank_in_warp,
)

# Turns of a search: enough for a rank within an eighth unless scores lie far apart, and then the guess is but lower.
SEARCH_TURNS = 10

if gluon is not None:
    _LEAST, _GREATEST = gl.constexpr(LEAST_INT), gl.constexpr(GREATEST_INT)
    _SEARCH_TURNS = gl.constexpr(SEARCH_TURNS)

    @gluon.jit
    def _bounds_of_lists(row_lists, count, rank, CAPACITY: gl.constexpr, layout: gl.constexpr):
        """Of every list [BQ] the scores as ordered ints `[BQ, CAPACITY]`, and a value that at least `rank` reach.

        The least int where a list holds no more than `rank`.
        """
        BQ: gl.constexpr = row_lists.shape[0]
        rows: gl.constexpr = gl.SliceLayout(1, layout)
        entry = gl.arange(0, CAPACITY, layout=gl.SliceLayout(0, layout))
        place = row_lists[:, None] + entry[None, :]
        valid = entry[None, :] < count[:, None]
        bits = gl.load(place, mask=valid, other=0)
        key = gl.where(valid, ordered_int(bits.to(gl.float32, bitcast=True)), _LEAST)
        inside = gl.min(gl.where(valid, key, _GREATEST), 1)
        beyond = gl.maximum(gl.max(key, 1) + 1, inside + 1)
        # As in `kth_largest_of_list`: the logarithm of how many reach a score falls evenly near the top.
        slack = rank // 8
        goal = gl.log2((rank + slack // 2).to(gl.float32) + 0.5)
        over = gl.log2(gl.maximum(count, 1).to(gl.float32)) - goal
        under = gl.zeros([BQ], gl.float32, rows) - 1.0 - goal
        reach = count
        moved = gl.zeros([BQ], gl.int32, rows)
        for turn in range(_SEARCH_TURNS):
            low_score = float_of_ordered(inside)
            step = (float_of_ordered(beyond) - low_score) * (over / gl.maximum(over - under, 1e-6))
            trial = ordered_int(low_score + step)
            middle = halfway(inside, beyond)
            trial = gl.where(turn % 4 == 3, middle, trial)
            trial = gl.maximum(gl.minimum(trial, beyond - 1), inside + 1)
            number = gl.sum((key >= trial[:, None]).to(gl.int32), 1)
            distance = gl.log2(gl.maximum(number.to(gl.float32), 0.5)) - goal
            wanted = (reach > rank + slack) & (inside < beyond - 1)
            up = wanted & (number >= rank)
            down = wanted & (number < rank)
            # An end that stays twice pulls half as much (the Illinois rule).
            under = gl.where(down, distance, gl.where(up & (moved == 1), 0.5 * under, under))
            over = gl.where(up, distance, gl.where(down & (moved == 2), 0.5 * over, over))
            inside = gl.where(up, trial, inside)
            reach = gl.where(up, number, reach)
            beyond = gl.where(down, trial, beyond)
            moved = gl.where(up, 1, gl.where(down, 2, moved))
        return key, gl.where(count > rank, inside, _LEAST)

    @gluon.jit
    def _cut_lists(row_lists, count, rank, CAPACITY: gl.constexpr, ROOM: gl.constexpr, layout: gl.constexpr):
        """Keep of every list what reaches its bound, in place; returns the bounds (scores) and the new counts."""
        BQ: gl.constexpr = row_lists.shape[0]
        key, least = _bounds_of_lists(row_lists, count, rank, CAPACITY, layout)
        entry = gl.arange(0, CAPACITY, layout=gl.SliceLayout(0, layout))
        keep = (key >= least[:, None]) & (entry[None, :] < count[:, None])
        left, number = rank_in_warp(keep)
        # A warp's row of 32 entries is a register of its lanes: their counts are summed along the registers.
        by_register = gl.reshape(number, [BQ, CAPACITY // 32, 32])
        before = gl.associative_scan(by_register, 1, add) - by_register
        place = gl.convert_layout(gl.reshape(before, [BQ, CAPACITY]), layout) + left
        barrier()
        # A list of nothing but ties would stay full: what is dropped can only lower the guess.
        bits = float_of_ordered(key).to(gl.int32, bitcast=True)
        gl.store(row_lists[:, None] + place, bits, mask=keep & (place < ROOM))
        barrier()
        kept = gl.minimum(gl.sum(keep.to(gl.int32), 1), ROOM)
        return gl.where(count > rank, float_of_ordered(least), float("-inf")), kept

    @gluon.jit
    def sample_group(q_desc, weights, rows, mask, guesses, lists, buffers, bars, sizes, rank, form: gl.constexpr):
        """The third warp group of a sampling pass, as the head of this file tells."""
        turns, first_turn, B, S, T, last_slot = sizes
        BQ: gl.constexpr = form.BQ
        CAPACITY: gl.constexpr = form.CAPACITY
        ROOM: gl.constexpr = CAPACITY - form.CHECK * TILE
        # A warp's lanes are 32 neighbouring keys of one query, or entries of its list.
        tile: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        by_row: gl.constexpr = gl.SliceLayout(1, tile)
        row = gl.arange(0, BQ, layout=by_row)
        lane = gl.arange(0, 32, layout=gl.SliceLayout(0, tile))
        row_lists = lists + gl.program_id(0).to(gl.int64) * (BQ * CAPACITY) + row * CAPACITY  # [BQ]
        done = gl.full((), 0, gl.int32)
        b, first_query, begin, tiles = block_of(0, rows, sizes, form)
        load_queries(q_desc, weights, buffers, bars, 0, b, first_query, S, form)
        for turn in range(turns):
            b, first_query, begin, tiles = begin_block(turn, q_desc, weights, rows, buffers, bars, sizes, form)
            first_row = b.to(gl.int64) * S + first_query
            real = (first_query + row < S) & (first_query >= 0)
            slot = gl.minimum(gl.load(rows.starts + b).to(gl.int32) + first_query + row, last_slot) // form.STRIDE
            slot = gl.where(real, slot, -1)  # [BQ]
            first_slot = gl.zeros([BQ], gl.int32, by_row)
            if form.HAS_FIRST:
                first_slot = gl.load(rows.first_keys + first_row + row, mask=real, other=0)
                first_slot = first_in_sample(first_slot, form.STRIDE)
            bound = gl.full([BQ], float("-inf"), gl.float32, by_row)
            count = gl.zeros([BQ, 32], gl.int32, tile)
            for t in range(0, tiles, 2):
                pair = (done + t) // 2
                scores = load_scores(buffers, bars, pair, tile, form)
                for side in gl.static_range(4):
                    score = scores[side]
                    key = begin + t * TILE + side * 32 + lane  # [32]
                    keep = is_kept(score, bound, key, slot, first_slot, mask, b, T, form)
                    left, number = rank_in_warp(keep)
                    gl.store(row_lists[:, None] + (count + left), score.to(gl.int32, bitcast=True), mask=keep)
                    count += number
                if t % form.CHECK == form.CHECK - 2:  # noqa: SIM102
                    if gl.max(gl.max(count, 1), 0) > ROOM:
                        barrier()
                        bound, kept = _cut_lists(row_lists, gl.max(count, 1), rank, CAPACITY, ROOM, tile)
                        count = kept[:, None] + gl.zeros([BQ, 32], gl.int32, tile)
            done += tiles
            barrier()
            key, least = _bounds_of_lists(row_lists, gl.max(count, 1), rank, CAPACITY, tile)
            guess = gl.where(gl.max(count, 1) > rank, float_of_ordered(least), float("-inf"))
            gl.store(guesses + first_row + row, guess, mask=real)
            barrier()

else:  # Without Gluon the kernel that calls this does not exist either; importing its name must work.
    sample_group = None
