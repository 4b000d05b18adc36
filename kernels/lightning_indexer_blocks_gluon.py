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
    def block_of(turn, starts, first_keys, sizes, BQ: gl.constexpr, STRIDE: gl.constexpr, HAS_FIRST: gl.constexpr):
        """Batch, first query (negative: no block), first key and even number of tiles of a program's block at a turn.

        Longest rows first, back and forth, so that programs end together.
        """
        turns, B, S, T, last_slot = sizes
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
            tiles = gl.maximum(end - begin + 127, 0) // 128 * 2
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
        """Start to copy a block's queries, and write its weights, into the buffers of the turn's parity."""
        # 0, which the compiler does not know: else it keeps these numbers over the loops around, and spills them.
        zero = turn >> 24
        column = gl.arange(0, BQ * H, layout=gl.BlockedLayout([2], [32], [4], [0])) + zero
        if first_query >= 0:
            parity = turn & 1
            first_row = b * S + first_query
            mbarrier.expect(q_full.index(parity), q_desc.block_type.nbytes)
            load_tile(q_desc, [first_row * H, 0], q_full.index(parity), q_tiles.index(parity))
            w = gl.load(weights + first_row.to(gl.int64) * H + column, mask=first_query + column // H < S, other=0.0)
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
        tile,
        place,
        BQ: gl.constexpr,
        STRIDE: gl.constexpr,
        HAS_FIRST: gl.constexpr,
        STAGES: gl.constexpr,
    ):
        """Start to copy the program's tile number `tile`, sought from a block on; returns the block it is in.

        Such a `place` is the block's turn, the tiles before it, its first row of keys and its number of tiles.
        """
        turns, B, S, T, last_slot = sizes
        turn, done, row, tiles = place
        while (tile - done >= tiles) & (turn < turns):
            done += tiles
            turn += 1
            b, first_query, begin, tiles = block_of(turn, starts, first_keys, sizes, BQ, STRIDE, HAS_FIRST)
            row = b * T + begin
        if turn < turns:
            stage = tile % STAGES
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            load_tile(k_desc, [row + (tile - done) * 64, 0], k_full.index(stage), k_tiles.index(stage))
        return turn, done, row, tiles

else:  # Without Gluon the kernel that calls these does not exist either; importing their names must work.
    block_of = load_keys = load_queries = None
