"""Which queries and keys a program of the Hopper lightning indexer works on, and their copies to shared memory."""

from __future__ import annotations

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

    # Renamed after Triton 3.6.
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier
    load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
except (ImportError, AttributeError):
    gluon = None

if gluon is not None:

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
    def block_of(turn, starts, first_keys, sizes, BQ: gl.constexpr, STRIDE: gl.constexpr, HAS_FIRST: gl.constexpr):
        """Batch, first query (negative: no block), first key and even number of tiles of a program's block at a turn.

        Longest rows first, back and forth, so that programs end together.
        """
        turns, first_turn, B, S, T, last_slot = sizes
        block = block_number(first_turn + turn)
        groups = (S + BQ - 1) // BQ
        b = block % B
        first_query = gl.where(turn < turns, groups - 1 - block // B, -1) * BQ
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
                begin = first_in_sample(begin, STRIDE)
            # At least a pair of tiles, so that nobody is a whole block ahead of the others.
            begin = gl.minimum(begin, gl.maximum(end - 1, 0))
            tiles = gl.maximum(end - begin + 127, 128) // 128 * 2
        return b, first_query, begin, tiles

    @gluon.jit
    def load_queries(
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
        """Start to copy a block's queries, heads outermost, and write its weights, into the buffers of the parity."""
        # 0, which the compiler does not know: else it keeps these numbers over the loops around, and spills them.
        zero = turn >> 24
        column = gl.arange(0, H * BQ, layout=gl.BlockedLayout([2], [32], [4], [0])) + zero
        if first_query >= 0:
            parity = turn & 1
            first_row = b * S + first_query
            mbarrier.expect(q_full.index(parity), q_desc.block_type.nbytes)
            load_tile(q_desc, [0, first_row, 0], q_full.index(parity), q_tiles.index(parity))
            query = column % BQ
            place = (first_row + query).to(gl.int64) * H + column // BQ
            w = gl.load(weights + place, mask=first_query + query < S, other=0.0)
            w_tiles.index(parity).store(w * 0.5)
            barrier()
            mbarrier.arrive(q_full.index(parity), count=1)

    @gluon.jit
    def load_keys(
        k_desc,
        k_tiles,
        k_full,
        starts,
        first_keys,
        sizes,
        number,
        group: gl.constexpr,
        place,
        BQ: gl.constexpr,
        STRIDE: gl.constexpr,
        HAS_FIRST: gl.constexpr,
        OWN: gl.constexpr,
    ):
        """Start to copy a score group's tile of this number, sought from a block on; returns the block it is in.

        Either group has every other tile, and OWN stages for them. Such a `place` is the block's turn, the tiles
        before it, its first row of keys and its number of tiles.
        """
        turns, first_turn, B, S, T, last_slot = sizes
        turn, done, row, tiles = place
        tile = number * 2 + group
        while (tile - done >= tiles) & (turn < turns):
            done += tiles
            turn += 1
            b, first_query, begin, tiles = block_of(turn, starts, first_keys, sizes, BQ, STRIDE, HAS_FIRST)
            row = b * T + begin
        if turn < turns:
            stage = number % OWN * 2 + group
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            load_tile(k_desc, [row + (tile - done) * 64, 0], k_full.index(stage), k_tiles.index(stage))
        return turn, done, row, tiles

else:  # Without Gluon the kernel that calls these does not exist either; importing their names must work.
    block_number = block_of = first_in_sample = load_keys = load_queries = None
