"""Which queries and keys a program of the Hopper lightning indexer works on, and their copies to shared memory.

Legend: as `lightning_indexer_hopper_gluon.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..common.gluon_support import barrier, gl, gluon, load_tile, mbarrier
from ..common.kernel_constants import GREATEST_INT

# Keys of a tile: rows of a matrix product, 64 a warp group.
TILE_KEYS = 64


class Form(NamedTuple):
    """Constants of the kernel, which it makes of its own.

    Attributes:
        H: heads.
        BQ: queries of a block.
        CAPACITY: entries of a list.
        STRIDE: of the sample of keys, 1 for all of them.
        SAMPLING: bounds are guessed from a sample, instead of keys selected.
        STAGES: tiles of keys in shared memory.
        SLOTS: pairs of tiles of scores in shared memory.
        CHECK: tiles between two looks at the lists' lengths.
        KEEP_WEIGHTS: they keep the weights of their columns in registers.
        HAS_FIRST: the first slot that each query may see is given.
        HAS_MASK: a mask of keys is given.
        HAS_SCALE: keys have scales.
        HAS_GUESS: bounds have been guessed.
    """

    H: int
    BQ: int
    CAPACITY: int
    STRIDE: int
    SAMPLING: bool
    STAGES: int
    SLOTS: int
    CHECK: int
    KEEP_WEIGHTS: bool
    HAS_FIRST: bool
    HAS_MASK: bool
    HAS_SCALE: bool
    HAS_GUESS: bool


class Rows(NamedTuple):
    """What queries see: the slot of each batch row's first query, and the first slot that each query sees or None."""

    starts: Any
    first_keys: Any


class Sizes(NamedTuple):
    """Of a launch: turns of each program and the first of them, batch, queries, keys, last slot of a key."""

    turns: Any
    first_turn: Any
    B: Any
    S: Any
    T: Any
    last_slot: Any


class Buffers(NamedTuple):
    """Shared memory.

    Attributes:
        queries: of two blocks in turn, `[2, H, BQ, D]`.
        weights: of their columns, `[2, BQ * H]`.
        keys: a tile a stage, `[STAGES, 64, D]`.
        scores: two tiles a slot, `[2 * SLOTS, BQ, 64]`.
    """

    queries: Any
    weights: Any
    keys: Any
    scores: Any


class Bars(NamedTuple):
    """Barriers.

    Attributes:
        q_full: a block's queries and weights have arrived, by its parity.
        k_full: a stage's keys have.
        slot_full: both score groups have written a pair of tiles.
        slot_empty: the selector has read it.
        turns: whose turn it is to multiply, the first or the second score group's.
    """

    q_full: Any
    k_full: Any
    slot_full: Any
    slot_empty: Any
    turns: Any


if gluon is not None:
    TILE, PAIR = gl.constexpr(TILE_KEYS), gl.constexpr(2 * TILE_KEYS)
    _GREATEST = gl.constexpr(GREATEST_INT)

    @gluon.jit
    def block_number(turn):
        """The number of a program's block at a turn, counted over all launches."""
        program = gl.program_id(0)
        programs = gl.num_programs(0)
        return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)

    @gluon.jit
    def first_in_sample(slot, STRIDE: gl.constexpr):
        """Which of every STRIDE-th key is the first from `slot` on, any int32."""
        slot = gl.maximum(slot, 0)
        return slot // STRIDE + (slot % STRIDE > 0).to(gl.int32)

    @gluon.jit
    def block_of(turn, rows, sizes, form: gl.constexpr):
        """Batch, first query (negative: no block), first key and even number of tiles of a program's block at a turn.

        Longest rows first, back and forth, so that programs end together.
        """
        turns, first_turn, B, S, T, last_slot = sizes
        BQ: gl.constexpr = form.BQ
        block = block_number(first_turn + turn)
        groups = (S + BQ - 1) // BQ
        b = block % B
        first_query = gl.where(turn < turns, groups - 1 - block // B, -1) * BQ
        tiles = gl.full((), 0, gl.int32)
        begin = gl.full((), 0, gl.int32)
        if first_query >= 0:
            start = gl.load(rows.starts + b).to(gl.int32)
            end = gl.minimum(start + gl.minimum(first_query + BQ, S) - 1, last_slot) // form.STRIDE + 1
            if form.HAS_FIRST:
                begin = gl.full((), _GREATEST, gl.int32)
                for i in gl.static_range(BQ):
                    query = gl.minimum(first_query + i, S - 1)
                    begin = gl.minimum(begin, gl.load(rows.first_keys + b.to(gl.int64) * S + query))
                begin = first_in_sample(begin, form.STRIDE)
            # At least a pair of tiles, so that nobody is a whole block ahead of the others.
            begin = gl.minimum(begin, gl.maximum(end - 1, 0))
            tiles = gl.maximum(end - begin + PAIR - 1, PAIR) // PAIR * 2
        return b, first_query, begin, tiles

    @gluon.jit
    def load_queries(q_desc, weights, buffers, bars, turn, b, first_query, S, form: gl.constexpr):
        """Start to copy a block's queries, heads outermost, and write its weights, into the buffers of the parity."""
        # 0, which the compiler does not know: else it keeps these numbers over the loops around, and spills them.
        zero = turn >> 24
        column = gl.arange(0, form.H * form.BQ, layout=gl.BlockedLayout([2], [32], [4], [0])) + zero
        if first_query >= 0:
            parity = turn & 1
            first_row = b * S + first_query
            mbarrier.expect(bars.q_full.index(parity), q_desc.block_type.nbytes)
            load_tile(q_desc, [0, first_row, 0], bars.q_full.index(parity), buffers.queries.index(parity))
            query = column % form.BQ
            place = (first_row + query).to(gl.int64) * form.H + column // form.BQ
            w = gl.load(weights + place, mask=first_query + query < S, other=0.0)
            buffers.weights.index(parity).store(w * 0.5)
            barrier()
            mbarrier.arrive(bars.q_full.index(parity), count=1)

    @gluon.jit
    def begin_block(turn, q_desc, weights, rows, buffers, bars, sizes, form: gl.constexpr):
        """As `block_of`; the queries of the block after it are on their way, as of the first block when that begins.

        Their buffer is free: all tiles of the block before are scored.
        """
        b, first_query, begin, tiles = block_of(turn + 1, rows, sizes, form)
        load_queries(q_desc, weights, buffers, bars, turn + 1, b, first_query, sizes.S, form)
        return block_of(turn, rows, sizes, form)

    @gluon.jit
    def is_kept(score, bound, key, slot, first_slot, mask, b, T, form: gl.constexpr):
        """Which scores `[BQ, 32]` of keys [32] are above their row's bound and visible."""
        keep = (score > bound[:, None]) & (key[None, :] <= slot[:, None])
        if form.HAS_FIRST:
            keep = keep & (key[None, :] >= first_slot[:, None])
        if form.HAS_MASK:
            allowed = gl.load(mask + b.to(gl.int64) * T + key, mask=key < T, other=0)
            keep = keep & (allowed != 0)[None, :]
        return keep

    @gluon.jit
    def load_keys(k_desc, rows, buffers, bars, sizes, number, group: gl.constexpr, place, form: gl.constexpr):
        """Start to copy a score group's tile of this number, sought from a block on; returns the block it is in.

        Either group has every other tile, and half of the stages for them. Such a `place` is the block's turn, the
        tiles before it, its first row of keys and its number of tiles.
        """
        turns, first_turn, B, S, T, last_slot = sizes
        turn, done, row, tiles = place
        tile = number * 2 + group
        while (tile - done >= tiles) & (turn < turns):
            done += tiles
            turn += 1
            b, first_query, begin, tiles = block_of(turn, rows, sizes, form)
            row = b * T + begin
        if turn < turns:
            stage = number % (form.STAGES // 2) * 2 + group
            mbarrier.expect(bars.k_full.index(stage), k_desc.block_type.nbytes)
            load_tile(k_desc, [row + (tile - done) * TILE, 0], bars.k_full.index(stage), buffers.keys.index(stage))
        return turn, done, row, tiles

else:  # Without Gluon the kernel that calls these does not exist either; importing their names must work.
    begin_block = block_number = block_of = first_in_sample = is_kept = load_keys = load_queries = None
    TILE = PAIR = None
