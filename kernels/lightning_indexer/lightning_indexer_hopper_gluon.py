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

Legend: B batch, S queries, T keys, H heads, D width; see `Form` for the constants, and `Rows`, `Sizes`, `Buffers` and
`Bars` for what travels together.
"""

from __future__ import annotations

import torch

from ..common.gluon_support import TensorDescriptor, barrier, gl, gluon, mbarrier
from ..common.kernel_launch import launcher
from ..common.triton_support import triton
from .lightning_indexer_blocks_gluon import TILE, TILE_KEYS, Bars, Buffers, Form, Rows, Sizes
from .lightning_indexer_sample_gluon import sample_group
from .lightning_indexer_scores_gluon import SLOT_LAYOUT, WEIGHTS_LAYOUT, score_group
from .lightning_indexer_select_gluon import LIST_EXTRA, finish_rows_kernel, select_group

# Columns of a score tile, queries times heads: the widest product, and 128 sums of each thread.
COLUMNS = 256
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
        sampled = (q, sample, sample_scale, weights, guess_rank(topk), starts, first_keys, sample_mask)
        _launch(*sampled, out, redo, guesses, last, programs, True)
    given = (q, k, k_scale, weights, topk, starts, first_keys, mask)
    _launch(*given, out, redo, guesses, k.shape[1] - 1, programs, False)
    return None if guesses is None else redo


def kernel_constants(H: int, element_bytes: int, sampling: bool, masked: bool) -> dict[str, int]:
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
            *(q_desc, k_desc, k_scale, weights, starts, first_keys, mask, guesses, out, lists),
            *(B, S, T, last_slot, topk, number, first_turn),
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
                *(lists, out, redo, B, S, topk, out.shape[2], first_turn * programs),
                BQ=BQ,
                CAPACITY=capacity,
                ROW=lists.shape[2],
                HAS_GUESS=has_guess,
                num_warps=4,
            )


if gluon is not None:

    @gluon.jit
    def _third_group(q_desc, weights, rows, mask, guesses, out, lists, buffers, bars, sizes, topk, form: gl.constexpr):
        if form.SAMPLING:
            sample_group(q_desc, weights, rows, mask, guesses, lists, buffers, bars, sizes, topk, form)
        else:
            select_group(q_desc, weights, rows, mask, guesses, out, lists, buffers, bars, sizes, topk, form)

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
        """Lists of whole query blocks, or with SAMPLING their guesses, as described above.

        Of every program those of `turns` turns from `first_turn` on.
        """
        D: gl.constexpr = k_desc.block_type.shape[1]
        form: gl.constexpr = Form(
            *(H, BQ, CAPACITY, STRIDE, SAMPLING, STAGES, SLOTS, CHECK, KEEP_WEIGHTS),
            *(HAS_FIRST, HAS_MASK, HAS_SCALE, HAS_GUESS),
        )
        q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, H, BQ, D], q_desc.layout)
        k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, D], k_desc.layout)
        w_tiles = gl.allocate_shared_memory(gl.float32, [2, BQ * H], WEIGHTS_LAYOUT)
        slots = gl.allocate_shared_memory(gl.float32, [2 * SLOTS, BQ, TILE], SLOT_LAYOUT)
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
        sizes = Sizes(turns, first_turn, B, S, T, last_slot)
        buffers = Buffers(q_tiles, w_tiles, k_tiles, slots)
        bars = Bars(q_full, k_full, slot_full, slot_empty, (first_turns, second_turns))
        rows = Rows(starts, first_keys)
        gl.warp_specialize(
            [
                (
                    _third_group,
                    (q_desc, weights, rows, mask, guesses, out, lists, buffers, bars, sizes, topk, form),
                ),
                (score_group, (0, k_desc, k_scale, rows, buffers, bars, sizes, form)),
                (score_group, (1, k_desc, k_scale, rows, buffers, bars, sizes, form)),
            ],
            [4, 4],  # warps
            [REGISTERS, REGISTERS],
        )
