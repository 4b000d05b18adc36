"""Scores of tiles of keys by blocks of queries: Hopper's tensor cores, then sums over heads, in Gluon."""

from __future__ import annotations

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

    # Renamed after Triton 3.6.
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier
except (ImportError, AttributeError):
    gluon = None

if gluon is not None:
    from .lightning_indexer_blocks_gluon import block_of, load_keys

    # The weights of a thread's columns (pairs, 8 apart) stand in fours, those of a quad's lanes side by side.
    WEIGHTS_LAYOUT = gl.constexpr(gl.SharedLinearLayout([[1], [8], [2], [4], [16], [32], [64], [128]]))

    @gluon.jit
    def _from_lane(x, DISTANCE: gl.constexpr):
        """What the lane with one bit of its number flipped, the one worth DISTANCE (1 or 2), holds."""
        if DISTANCE == 2:
            got = gl.inline_asm_elementwise(
                "shfl.sync.bfly.b32 $0, $1, 2, 31, -1;", "=f,f", [x], gl.float32, is_pure=False, pack=1
            )
        else:
            got = gl.inline_asm_elementwise(
                "shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", "=f,f", [x], gl.float32, is_pure=False, pack=1
            )
        return got

    @gluon.jit
    def _halve(x, LANE_BIT: gl.constexpr):
        """Sum `x` [64, N, 4] over a bit of its last axis, the four lanes of a quad, and halve the work of each lane.

        The lanes whose bit is set keep the second half of the middle axis, the others the first: `[64, N / 2, 4]`.
        """
        N: gl.constexpr = x.shape[1]
        first, second = gl.split(gl.permute(gl.reshape(x, [64, 2, N // 2, 4]), (0, 2, 3, 1)))
        lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, first.type.layout)))
        upper = ((lane & LANE_BIT) != 0)[None, None, :]
        return gl.where(upper, second, first) + _from_lane(gl.where(upper, first, second), LANE_BIT)

    @gluon.jit
    def sum_over_heads(terms, BQ: gl.constexpr, H: gl.constexpr):
        """`[64, BQ * H]` as the tensor cores leave it to `[64, BQ]`, each score in one thread."""
        # Of 8 neighbouring columns a lane holds two and the others of its quad the rest.
        by_lane = gl.permute(gl.reshape(terms, [64, BQ, H // 8, 4, 2]), (0, 1, 3, 2, 4))
        parts = gl.sum(gl.reshape(by_lane, [64, BQ, 4, H // 4]), 3)  # [64, BQ, 4]
        parts = _halve(_halve(parts, 2), 1)  # [64, BQ / 4, 4]
        return gl.reshape(gl.permute(parts, (0, 2, 1)), [64, BQ])

    @gluon.jit
    def score_group(
        group: gl.constexpr,
        k_desc,
        k_scale,
        starts,
        first_keys,
        buffers,
        bars,
        sizes,
        H: gl.constexpr,
        BQ: gl.constexpr,
        STRIDE: gl.constexpr,
        HAS_FIRST: gl.constexpr,
        HAS_SCALE: gl.constexpr,
        STAGES: gl.constexpr,
        SLOTS: gl.constexpr,
    ):
        """A score group: every other tile of every block of the program, from the load of its keys to its scores."""
        depth: gl.constexpr = 256 // k_desc.dtype.primitive_bitwidth
        acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BQ * H, depth])
        key = gl.arange(0, 64, layout=gl.SliceLayout(1, acc_layout))
        turns, B, S, T, last_slot = sizes
        q_tiles, w_tiles, k_tiles, slots = buffers
        q_full, k_full, slot_full, slot_empty, my_turn = bars
        # The next tile to load, and the block it is in.
        ahead = gl.full((), 0, gl.int32) + group
        b, first_query, begin, tiles = block_of(0, starts, first_keys, sizes, BQ, STRIDE, HAS_FIRST)
        place = (gl.full((), 0, gl.int32), gl.full((), 0, gl.int32), b * T + begin, tiles)
        for _ in gl.static_range(STAGES // 2 - 1):
            place = load_keys(
                k_desc, k_tiles, k_full, starts, first_keys, sizes, ahead, place, BQ, STRIDE, HAS_FIRST, STAGES
            )
            ahead += 2
        done = gl.full((), 0, gl.int32)
        mine = gl.full((), 0, gl.int32)
        for turn in range(turns):
            b, first_query, begin, tiles = block_of(turn, starts, first_keys, sizes, BQ, STRIDE, HAS_FIRST)
            if first_query >= 0:
                parity = turn & 1
                mbarrier.wait(q_full.index(parity), (turn >> 1) & 1)
                for t in range(group, tiles, 2):
                    stage = (done + t) % STAGES
                    pair = (done + t) // 2
                    slot = pair % SLOTS
                    mbarrier.wait(k_full.index(stage), ((done + t) // STAGES) & 1)
                    mbarrier.wait(my_turn.index(group), (mine & 1) ^ (1 - group))
                    acc = gl.zeros([64, BQ * H], gl.float32, acc_layout)
                    k_tile = k_tiles.index(stage)
                    q_tile = q_tiles.index(parity).permute((1, 0))
                    acc = warpgroup_mma(k_tile, q_tile, acc, use_acc=False, is_async=True)
                    mbarrier.arrive(my_turn.index(1 - group), count=1)
                    mine += 1
                    if HAS_SCALE:
                        at = b * T + begin + t * 64 + key
                        scale = gl.load(k_scale + at, mask=at < B * T, other=0.0)
                    # The stage of this group's tile before is free: its next but one is loaded under the product.
                    place = load_keys(
                        k_desc, k_tiles, k_full, starts, first_keys, sizes, ahead, place, BQ, STRIDE, HAS_FIRST, STAGES
                    )
                    ahead += 2
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    w = w_tiles.index(parity).load(gl.SliceLayout(0, acc_layout))
                    # x + |x| is twice relu(x), exactly, and runs where the sums do; the weights are halved.
                    terms = (acc + gl.abs(acc)) * w[None, :]
                    score = sum_over_heads(terms, BQ, H)  # [64, BQ]
                    if HAS_SCALE:
                        score *= gl.convert_layout(scale, gl.SliceLayout(1, score.type.layout))[:, None]
                    mbarrier.wait(slot_empty.index(slot), ((pair // SLOTS) & 1) ^ 1)
                    slots.index(slot).slice(group * 64, 64, dim=1).permute((1, 0)).store(score)
                    barrier()
                    mbarrier.arrive(slot_full.index(slot), count=1)
            done += tiles

else:  # Without Gluon the kernel that calls these does not exist either; importing their names must work.
    WEIGHTS_LAYOUT = score_group = sum_over_heads = None
