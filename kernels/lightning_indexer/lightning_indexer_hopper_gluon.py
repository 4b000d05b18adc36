"""The lightning indexer's prefill for Hopper (sm90) in Gluon: scores by two warp groups, selection by a third.

A program owns BQ queries (BQ * heads = 256 columns) and visits their keys in pairs of tiles of 64. Three warp groups:

- two score groups take a tile of every pair each, in turn: while one's matrix product runs, the other reduces its own
  over the heads; each copies its next tiles to shared memory (TMA) itself;
- the selector appends the scores above a row's bound to the row's list, in key order, and cuts a list that is full. It
  is a chain of waits, a pair of tiles long, so nothing that can be done elsewhere is done here, and it leaves its
  registers to the score groups, which keep their heads' weights in them.

A launch fills the lists of some thousand rows, and another kernel selects from them, a program a row.

The bound comes from a sample: the same kernel first scores every `SAMPLE_STRIDE`-th key and gives for each query the
score of a rank that should leave a little more than `topk` of all keys above it. Nothing rests on the guess: a list
that ends with `topk` entries or more holds the exact selection (`lightning_indexer_select_triton.py`), and the rows of
the others are marked in `redo` for the portable kernel.
"""

from __future__ import annotations

import torch

from ..common.kernel_launch import launcher
from .lightning_indexer_blocks_gluon import block_number, block_of, load_queries
from .lightning_indexer_sample_gluon import sample_group
from .lightning_indexer_scores_gluon import SLOT_LAYOUT, WEIGHTS_LAYOUT, score_group
from .lightning_indexer_select_gluon import (
    bound_of_full_list,
    copy_best,
    finish_rows_kernel,
    float_of_ordered,
    load_scores,
    rank_in_warp,
)

try:
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Renamed after Triton 3.6.
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier
except (ImportError, AttributeError):
    gluon = None

COLUMNS = 256
TILE_KEYS = 64
# Pairs of score tiles between the groups and the selector, of 128 keys and BQ queries in fp32: 32 KB at most.
SCORE_SLOT_QUERIES = 64
# Tiles between two looks at the lists' lengths.
CHECK_TILES = 16
# Rows with lists at a time, 48 KB each.
LIST_ROWS = 8448
# Of a thread of the score groups, with and without the weights of its columns; the selector has what is left, 88 or
# 184. With 16 heads (of 16 queries), in a sampling pass, and with masks and 64 heads it needs more than 88.
SCORE_REGISTERS = 208
SCORE_REGISTERS_ALONE = 160
# Of 64 heads in bf16, where 208 leave the selector three too few with Triton 3.9.
SCORE_REGISTERS_64 = 200
SAMPLE_STRIDE = 32
# False: e4m3 queries are scored in bf16, slower and with an accumulator of fp32 where e4m3's keeps fewer bits.
MULTIPLY_E4M3 = True
# Lists of fewer than this many keys need no guess.
LIST_KEYS = 6144
# Entries behind a list's scores and keys: what is known of it (a multiple of 4 keeps rows aligned).
LIST_EXTRA = 16
# Below this top-k a list holds so many times its keys that cuts are rare without a guess.
LEAST_GUESSED_TOPK = 1024


def hopper_supports(q: torch.Tensor, k: torch.Tensor, topk: int) -> bool:
    """Whether the kernel takes these tensors: 16, 32 or 64 heads of width 64 or 128, rows at multiples of 16 bytes.

    Keys for e4m3 queries may still be in a wider dtype.
    """
    B, S, H, D = q.shape
    T = k.shape[1]
    return (
        gluon is not None
        and H in (16, 32, 64)
        and D in (64, 128)
        and (MULTIPLY_E4M3 if q.dtype == torch.float8_e4m3fn else k.dtype == q.dtype)
        and q.is_contiguous()
        and q.data_ptr() % 16 == 0
        and k.data_ptr() % 16 == 0
        and k.stride(1) % 16 == 0
        and (B == 1 or k.stride(0) == T * k.stride(1))
        # A list that was cut, to topk and an eighth at most, has room for the keys until the next look.
        and topk + topk // 8 + CHECK_TILES * TILE_KEYS <= LIST_KEYS
    )


def key_stages(element_bytes: int) -> int:
    """Tiles of keys in shared memory: 64 KB at a width of 128."""
    return 8 // element_bytes


def score_slots(BQ: int) -> int:
    """Pairs of tiles that the selector may be behind."""
    return SCORE_SLOT_QUERIES // max(BQ, 8)


def sample_list_keys(BQ: int) -> int:
    """Scores in a list of a sampling pass: half is room for what comes between two looks at the lengths."""
    return 512 if BQ <= 8 else 256


def guess_rank(topk: int) -> int:
    """Rank in the sample whose score at least `topk` of all keys reach, with odds of 30 million to one for 2,048.

    The sampled ones among the `topk` best are nearly Poisson distributed with mean `topk / SAMPLE_STRIDE`.
    """
    expected = topk / SAMPLE_STRIDE
    return int(expected + 5.5 * expected**0.5 + 4)


def lightning_indexer_hopper(
    q, k, k_scale, weights, topk, starts, first_keys, mask, out, programs
) -> torch.Tensor | None:
    """Fill `out`; returns `redo` int32 `[B, S]`, 1 for rows whose guess was too high: their selection is not right.

    None where nothing had to be guessed, and all rows are right.

    `weights`: fp32 `[B, S, H]`, contiguous, times the scale; the rest as in `lightning_indexer_triton`.
    """
    B, S, H, D = q.shape
    redo = torch.zeros(B, S, dtype=torch.int32, device=q.device)
    guesses = None
    if topk >= LEAST_GUESSED_TOPK and k.shape[1] > LIST_KEYS:
        guesses = torch.empty(B, S, dtype=torch.float32, device=q.device)
        sample = k[:, ::SAMPLE_STRIDE].contiguous()
        sample_scale = None if k_scale is None else k_scale[:, ::SAMPLE_STRIDE].contiguous()
        sample_mask = None if mask is None else mask[:, ::SAMPLE_STRIDE].contiguous()
        last = k.shape[1] - 1
        _launch(
            q,
            sample,
            sample_scale,
            weights,
            guess_rank(topk),
            starts,
            first_keys,
            sample_mask,
            out,
            redo,
            guesses,
            last,
            programs,
            True,
        )
    _launch(
        q, k, k_scale, weights, topk, starts, first_keys, mask, out, redo, guesses, k.shape[1] - 1, programs, False
    )
    return None if guesses is None else redo


def kernel_constants(H: int, element_bytes: int, sampling: bool, masked: bool) -> dict:
    """The kernel's constants but for what is given or not (HAS_...); `masked`: a mask or first keys are."""
    BQ = COLUMNS // H
    capacity = sample_list_keys(BQ) if sampling else LIST_KEYS
    keep_weights = BQ <= 8 and not sampling and not (masked and BQ < 8)
    registers = SCORE_REGISTERS_64 if BQ < 8 and element_bytes == 2 else SCORE_REGISTERS
    return {
        "H": H,
        "BQ": BQ,
        "CAPACITY": capacity,
        "STRIDE": SAMPLE_STRIDE if sampling else 1,
        "SAMPLING": sampling,
        "STAGES": key_stages(element_bytes),
        "SLOTS": score_slots(BQ),
        "CHECK": capacity // 128 if sampling else CHECK_TILES,
        "REGISTERS": registers if keep_weights else SCORE_REGISTERS_ALONE,
        "KEEP_WEIGHTS": keep_weights,
    }


def _launch(
    q, k, k_scale, weights, topk, starts, first_keys, mask, out, redo, guesses, last_slot, programs, sampling
) -> None:
    B, S, H, D = q.shape
    T = k.shape[1]
    masked = first_keys is not None or mask is not None
    constants = kernel_constants(H, k.element_size(), sampling, masked)
    BQ, capacity = constants["BQ"], constants["CAPACITY"]
    turns = launch_turns = triton.cdiv(triton.cdiv(S, BQ) * B, programs)
    if sampling:
        lists = torch.empty(programs, BQ, capacity, dtype=torch.int32, device=q.device)
    else:
        # An even number, so that programs, whose blocks lie back and forth, end together.
        launch_turns = min(turns, max(LIST_ROWS // (programs * BQ) // 2, 1) * 2)
        # Of each row: bits of fp32 scores, keys, their number and whether its first bound was a guess.
        shape = launch_turns * programs, BQ, 2 * capacity + LIST_EXTRA
        lists = torch.empty(shape, dtype=torch.int32, device=q.device)
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}.get(q.dtype, gl.float8e4nv)
    # Heads outermost, as the sums over heads want them (`lightning_indexer_scores_gluon.py`).
    q_rows, k_rows = q.view(B * S, H, D).transpose(0, 1), k.as_strided((B * T, D), (k.stride(1), 1))
    q_block, k_block = [H, BQ, D], [TILE_KEYS, D]
    q_desc = TensorDescriptor.from_tensor(q_rows, q_block, gl.NVMMASharedLayout.get_default_for(q_block, element))
    k_desc = TensorDescriptor.from_tensor(k_rows, k_block, gl.NVMMASharedLayout.get_default_for(k_block, element))
    has_guess = guesses is not None and not sampling
    for first_turn in range(0, turns, launch_turns):
        number = min(launch_turns, turns - first_turn)
        launcher(lightning_indexer_hopper_kernel, (programs,), q)(
            q_desc,
            k_desc,
            k_scale,
            weights,
            starts,
            first_keys,
            mask,
            guesses,
            out,
            lists,
            B,
            S,
            T,
            last_slot,
            topk,
            number,
            first_turn,
            HAS_FIRST=first_keys is not None,
            HAS_MASK=mask is not None,
            HAS_SCALE=k_scale is not None,
            HAS_GUESS=has_guess,
            **constants,
            num_warps=4,
            # Products and sums as one instruction, which is Triton's default until 3.9 only.
            enable_fp_fusion=True,
        )
        if not sampling:
            launcher(finish_rows_kernel, (number * programs * BQ,), lists)(
                lists,
                out,
                redo,
                B,
                S,
                topk,
                out.shape[2],
                first_turn * programs,
                BQ=BQ,
                CAPACITY=capacity,
                ROW=lists.shape[2],
                HAS_GUESS=has_guess,
                num_warps=4,
            )


if gluon is not None:
    _LIST_EXTRA = gl.constexpr(LIST_EXTRA)

    @gluon.jit
    def _select_group(
        q_desc,
        weights,
        starts,
        first_keys,
        mask,
        guesses,
        out,
        lists,
        buffers,
        bars,
        sizes,
        topk,
        H: gl.constexpr,
        BQ: gl.constexpr,
        CAPACITY: gl.constexpr,
        HAS_FIRST: gl.constexpr,
        HAS_MASK: gl.constexpr,
        HAS_GUESS: gl.constexpr,
        SLOTS: gl.constexpr,
        CHECK: gl.constexpr,
    ):
        turns, first_turn, B, S, T, last_slot = sizes
        q_tiles, w_tiles, k_tiles, slots = buffers
        q_full, k_full, slot_full, slot_empty, turns_to_multiply = bars
        # A warp's lanes are 32 neighbouring keys of one query.
        tile: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        rows: gl.constexpr = gl.SliceLayout(1, tile)
        line: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        row = gl.arange(0, BQ, layout=rows)
        lane = gl.arange(0, 32, layout=gl.SliceLayout(0, tile))
        ROW: gl.constexpr = 2 * CAPACITY + _LIST_EXTRA
        done = gl.full((), 0, gl.int32)
        b, first_query, begin, tiles = block_of(0, starts, first_keys, sizes, BQ, 1, HAS_FIRST)
        load_queries(q_desc, weights, q_tiles, w_tiles, q_full, 0, b, first_query, S, H, BQ)
        for turn in range(turns):
            # All tiles of the block before are scored: its queries' buffer is free.
            b, first_query, begin, tiles = block_of(turn + 1, starts, first_keys, sizes, BQ, 1, HAS_FIRST)
            load_queries(q_desc, weights, q_tiles, w_tiles, q_full, turn + 1, b, first_query, S, H, BQ)
            b, first_query, begin, tiles = block_of(turn, starts, first_keys, sizes, BQ, 1, HAS_FIRST)
            first_row = b.to(gl.int64) * S + first_query
            place = block_number(first_turn + turn) - first_turn * gl.num_programs(0)
            block_lists = lists + place.to(gl.int64) * (BQ * ROW)
            real = (first_query + row < S) & (first_query >= 0)
            slot = gl.minimum(gl.load(starts + b).to(gl.int32) + first_query + row, last_slot)
            slot = gl.where(real, slot, -1)  # [BQ]
            first_slot = gl.zeros([BQ], gl.int32, rows)
            if HAS_FIRST:
                first_slot = gl.load(first_keys + first_row + row, mask=real, other=0)
                first_slot = gl.maximum(first_slot, 0)
            bound = gl.full([BQ], float("-inf"), gl.float32, rows)
            if HAS_GUESS:
                guess = gl.load(guesses + first_row + row, mask=real, other=float("-inf"))
                bound = gl.where(slot - first_slot >= CAPACITY, guess, bound)
            row_lists = block_lists + row * ROW  # [BQ]
            gl.store(row_lists + (2 * CAPACITY + 1), (bound > float("-inf")).to(gl.int32))
            count = gl.zeros([BQ, 32], gl.int32, tile)
            for t in range(0, tiles, 2):
                pair = (done + t) // 2
                at = pair % SLOTS
                mbarrier.wait(slot_full.index(at), (pair // SLOTS) & 1)
                scores = load_scores(slots, at, tile)
                barrier()
                mbarrier.arrive(slot_empty.index(at), count=1)
                for side in gl.static_range(4):
                    score = scores[side]
                    key = begin + t * 64 + side * 32 + lane  # [32]
                    keep = (score > bound[:, None]) & (key[None, :] <= slot[:, None])
                    if HAS_FIRST:
                        keep = keep & (key[None, :] >= first_slot[:, None])
                    if HAS_MASK:
                        allowed = gl.load(mask + b.to(gl.int64) * T + key, mask=key < T, other=0)
                        keep = keep & (allowed != 0)[None, :]
                    rank, number = rank_in_warp(keep)
                    entry = row_lists[:, None] + (count + rank)
                    gl.store(entry, score.to(gl.int32, bitcast=True), mask=keep)
                    gl.store(entry + CAPACITY, key[None, :] + gl.zeros_like(rank), mask=keep)
                    count += number
                if t % CHECK == CHECK - 2:  # noqa: SIM102
                    if gl.max(gl.max(count, 1), 0) > CAPACITY - CHECK * 64:
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

    @gluon.jit(do_not_specialize=["B", "S", "T", "last_slot", "topk", "turns", "first_turn"])
    def lightning_indexer_hopper_kernel(
        q_desc,
        k_desc,
        k_scale,
        weights,
        starts,
        first_keys,
        mask,
        guesses,
        out,
        lists,
        B,
        S,
        T,
        last_slot,
        topk,
        turns,
        first_turn,
        H: gl.constexpr,
        BQ: gl.constexpr,
        CAPACITY: gl.constexpr,
        STRIDE: gl.constexpr,
        HAS_FIRST: gl.constexpr,
        HAS_MASK: gl.constexpr,
        HAS_SCALE: gl.constexpr,
        HAS_GUESS: gl.constexpr,
        SAMPLING: gl.constexpr,
        STAGES: gl.constexpr,
        SLOTS: gl.constexpr,
        CHECK: gl.constexpr,
        REGISTERS: gl.constexpr,
        KEEP_WEIGHTS: gl.constexpr,
    ):
        """Lists of whole query blocks, or with SAMPLING their guesses, as the head of this file tells.

        Of every program those of `turns` turns from `first_turn` on.
        """
        D: gl.constexpr = k_desc.block_type.shape[1]
        q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, H, BQ, D], q_desc.layout)
        k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 64, D], k_desc.layout)
        w_tiles = gl.allocate_shared_memory(gl.float32, [2, BQ * H], WEIGHTS_LAYOUT)
        slots = gl.allocate_shared_memory(gl.float32, [2 * SLOTS, BQ, 64], SLOT_LAYOUT)
        q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        # Apart: in one piece of memory, the compiler would put a barrier of its own between a wait and an arrival.
        first_turns = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        second_turns = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        slot_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        slot_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            # One arrival with the queries' bytes, one when the weights are written.
            mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(first_turns, count=1)
        mbarrier.init(second_turns, count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=1)
        for i in gl.static_range(SLOTS):
            # An arrival from either score group.
            mbarrier.init(slot_full.index(i), count=2)
            mbarrier.init(slot_empty.index(i), count=1)
        barrier()
        sizes = (turns, first_turn, B, S, T, last_slot)
        buffers = (q_tiles, w_tiles, k_tiles, slots)
        bars = (q_full, k_full, slot_full, slot_empty, (first_turns, second_turns))
        if SAMPLING:
            gl.warp_specialize(
                [
                    (
                        sample_group,
                        (
                            q_desc,
                            weights,
                            starts,
                            first_keys,
                            mask,
                            guesses,
                            lists,
                            buffers,
                            bars,
                            sizes,
                            topk,
                            H,
                            BQ,
                            CAPACITY,
                            STRIDE,
                            HAS_FIRST,
                            HAS_MASK,
                            SLOTS,
                            CHECK,
                        ),
                    ),
                    (
                        score_group,
                        (
                            0,
                            k_desc,
                            k_scale,
                            starts,
                            first_keys,
                            buffers,
                            bars,
                            sizes,
                            H,
                            BQ,
                            STRIDE,
                            HAS_FIRST,
                            HAS_SCALE,
                            STAGES,
                            SLOTS,
                            KEEP_WEIGHTS,
                        ),
                    ),
                    (
                        score_group,
                        (
                            1,
                            k_desc,
                            k_scale,
                            starts,
                            first_keys,
                            buffers,
                            bars,
                            sizes,
                            H,
                            BQ,
                            STRIDE,
                            HAS_FIRST,
                            HAS_SCALE,
                            STAGES,
                            SLOTS,
                            KEEP_WEIGHTS,
                        ),
                    ),
                ],
                [4, 4],
                [REGISTERS, REGISTERS],
            )
        else:
            gl.warp_specialize(
                [
                    (
                        _select_group,
                        (
                            q_desc,
                            weights,
                            starts,
                            first_keys,
                            mask,
                            guesses,
                            out,
                            lists,
                            buffers,
                            bars,
                            sizes,
                            topk,
                            H,
                            BQ,
                            CAPACITY,
                            HAS_FIRST,
                            HAS_MASK,
                            HAS_GUESS,
                            SLOTS,
                            CHECK,
                        ),
                    ),
                    (
                        score_group,
                        (
                            0,
                            k_desc,
                            k_scale,
                            starts,
                            first_keys,
                            buffers,
                            bars,
                            sizes,
                            H,
                            BQ,
                            STRIDE,
                            HAS_FIRST,
                            HAS_SCALE,
                            STAGES,
                            SLOTS,
                            KEEP_WEIGHTS,
                        ),
                    ),
                    (
                        score_group,
                        (
                            1,
                            k_desc,
                            k_scale,
                            starts,
                            first_keys,
                            buffers,
                            bars,
                            sizes,
                            H,
                            BQ,
                            STRIDE,
                            HAS_FIRST,
                            HAS_SCALE,
                            STAGES,
                            SLOTS,
                            KEEP_WEIGHTS,
                        ),
                    ),
                ],
                [4, 4],
                [REGISTERS, REGISTERS],
            )
