"""Scores of tiles of keys by blocks of queries: Hopper's tensor cores, then sums over heads, in Gluon.

Legend: as `lightning_indexer_hopper_gluon.py`.
"""

from __future__ import annotations

from ..common.gluon_support import barrier, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from .lightning_indexer_blocks_gluon import TILE, block_of, load_keys

if gluon is not None:
    # Columns are heads * queries, queries innermost, so that a thread's (pairs, 8 apart) are all heads of two queries,
    # or half of them with 4 queries: sums over heads need no other lane. Their weights stand in fours, those of a
    # quad's lanes side by side.
    WEIGHTS_LAYOUT = gl.constexpr(gl.SharedLinearLayout([[1], [8], [2], [4], [16], [32], [64], [128]]))
    # Those lanes hold different queries: their rows are stored 8 keys apart.
    SLOT_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))

    @gluon.jit
    def _sum_by_halves(x):
        """Sum `x` [M, N, 4] over its last axis, as (x0 + x2) + (x1 + x3)."""
        even, odd = gl.split(gl.sum(gl.reshape(x, [x.shape[0], x.shape[1], 2, 2]), 2))
        return even + odd

    @gluon.jit
    def sum_over_heads(terms, BQ: gl.constexpr, H: gl.constexpr):
        """`[64, H * BQ]` as the tensor cores leave it to `[64, BQ]`: of 8 neighbouring columns a lane holds two."""
        if BQ >= 8:
            by_head = gl.permute(gl.reshape(terms, [TILE, H // 8, 4, 2, BQ]), (0, 4, 2, 1, 3))
            score = _sum_by_halves(gl.sum(gl.reshape(by_head, [TILE, BQ, 4, H // 4]), 3))
        else:
            # Half of the heads are two lanes away.
            gl.static_assert(BQ == 4)
            by_head = gl.permute(gl.reshape(terms, [TILE, H // 8, 4, 2, BQ]), (0, 4, 3, 2, 1))
            parts = gl.sum(by_head, 4)  # [64, BQ, 2, 4]
            score = gl.sum(gl.reshape(_sum_by_halves(gl.reshape(parts, [TILE, BQ * 2, 4])), [TILE, BQ, 2]), 2)
        return score

    @gluon.jit
    def score_group(group: gl.constexpr, k_desc, k_scale, rows, buffers, bars, sizes, form: gl.constexpr):
        """A score group: every other tile of every block of the program, from the load of its keys to its scores."""
        D: gl.constexpr = k_desc.block_type.shape[1]
        H: gl.constexpr = form.H
        BQ: gl.constexpr = form.BQ
        SLOTS: gl.constexpr = form.SLOTS
        depth: gl.constexpr = 256 // k_desc.dtype.primitive_bitwidth
        acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H * BQ, depth])
        key = gl.arange(0, TILE, layout=gl.SliceLayout(1, acc_layout))
        turns, first_turn, B, S, T, last_slot = sizes
        # Stages of this group, and by its count the next of its tiles to load, with the block that is in.
        OWN: gl.constexpr = form.STAGES // 2
        ahead = gl.full((), 0, gl.int32)
        b, first_query, begin, tiles = block_of(0, rows, sizes, form)
        place = (gl.full((), 0, gl.int32), gl.full((), 0, gl.int32), b * T + begin, tiles)
        for _ in gl.static_range(OWN - 1):
            place = load_keys(k_desc, rows, buffers, bars, sizes, ahead, group, place, form)
            ahead += 1
        done = gl.full((), 0, gl.int32)
        mine = gl.full((), 0, gl.int32)
        for turn in range(turns):
            b, first_query, begin, tiles = block_of(turn, rows, sizes, form)
            if first_query >= 0:
                parity = turn & 1
                mbarrier.wait(bars.q_full.index(parity), (turn >> 1) & 1)
                if form.KEEP_WEIGHTS:
                    w = buffers.weights.index(parity).load(gl.SliceLayout(0, acc_layout))
                # Not from done on: Triton 3.6 takes `done` for 0 where it is in a loop's bounds only.
                for t in range(group, tiles, 2):
                    tile = done + t
                    stage = mine % OWN * 2 + group
                    pair = tile // 2
                    slot = pair % SLOTS
                    mbarrier.wait(bars.k_full.index(stage), (mine // OWN) & 1)
                    mbarrier.wait(bars.turns[group], (mine & 1) ^ (1 - group))
                    acc = gl.zeros([TILE, H * BQ], gl.float32, acc_layout)
                    k_tile = buffers.keys.index(stage)
                    q_tile = buffers.queries.index(parity).reshape([H * BQ, D]).permute((1, 0))
                    acc = warpgroup_mma(k_tile, q_tile, acc, use_acc=False, is_async=True)
                    # No warp may still wait for its turn when the other group can give the next one: it would miss it,
                    # as a wait knows phases by their parity alone.
                    barrier()
                    mbarrier.arrive(bars.turns[1 - group], count=1)
                    mine += 1
                    if form.HAS_SCALE:
                        at = b * T + begin + t * TILE + key
                        scale = gl.load(k_scale + at, mask=at < B * T, other=0.0)
                    # The stage of this group's tile before is free: its next but one is loaded under the product.
                    place = load_keys(k_desc, rows, buffers, bars, sizes, ahead, group, place, form)
                    ahead += 1
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    # x + |x| is twice relu(x), exactly, and runs where the sums do; the weights are halved.
                    if not form.KEEP_WEIGHTS:
                        w = buffers.weights.index(parity).load(gl.SliceLayout(0, acc_layout))
                    terms = (acc + gl.abs(acc)) * w[None, :]
                    score = sum_over_heads(terms, BQ, H)  # [64, BQ]
                    if form.HAS_SCALE:
                        score *= gl.convert_layout(scale, gl.SliceLayout(1, score.type.layout))[:, None]
                    mbarrier.wait(bars.slot_empty.index(slot), ((pair // SLOTS) & 1) ^ 1)
                    buffers.scores.index(tile % (2 * SLOTS)).permute((1, 0)).store(score)
                    barrier()
                    mbarrier.arrive(bars.slot_full.index(slot), count=1)
            done += tiles

else:  # Without Gluon the kernel that calls these does not exist either; importing their names must work.
    SLOT_LAYOUT = WEIGHTS_LAYOUT = score_group = sum_over_heads = None
