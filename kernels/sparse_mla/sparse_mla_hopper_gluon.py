"""Sparse MLA prefill for Hopper (sm90) in Gluon, for latents of 512 + 64 entries: 64 rows, pairs of 64-key blocks.

Three warp groups a program. The gatherer copies latents into two buffers. The left group scores even blocks and owns
value columns 0..255, the right group scores odd blocks and owns columns 256..511; each hands its probabilities to the
other through shared memory, in the place of the block's rotary part, which nobody needs once the scores are known.
The running maximum goes left -> right -> left, so both groups scale their halves alike (source of the schedule: the
"seesaw" of FlashMLA's design notes; the code is our own).

Legend: as `sparse_mla_triton.py`; M = 64 rows, N = 64 keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..common.gluon_support import (
    async_copy,
    async_load,
    barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ..common.kernel_constants import LN_2
from ..common.kernel_launch import launcher
from ..common.triton_support import triton
from .sparse_mla_lists_gluon import (
    ListForm,
    count_listed,
    is_listed,
    is_visible,
    opaque_zero,
    program_place,
    row_of,
    slot_of,
)
from .sparse_mla_union_triton import list_constants

# Rows (heads, or heads of a group of queries) of a program: what one warp group multiplies at once.
ROWS = 64
# Keys of a block, of which either group scores one of every pair.
BLOCK_KEYS = 64
VALUE_DIM, ROPE_DIM = 512, 64
# Either group's value columns: 64 x 256 sums in fp32 are 128 registers of each of its threads.
HALF_VALUE = VALUE_DIM // 2
# Registers of a thread of the right group and of the gatherer; the left group, which begins as the whole program's
# default, has the 216 that are left of 64K: 128 x (216 + 216 + 72) = 64,512.
RIGHT_REGISTERS, GATHER_REGISTERS = 216, 72


class Tiles(NamedTuple):
    """Shared memory: queries once, latents of two blocks, each in a lower and an upper half and a rotary part.

    Attributes:
        q_lo: queries' value columns 0 .. 255, `[1, M, 256]`.
        q_hi: their columns 256 .. 511.
        q_rope: their rotary columns, `[1, M, 64]`.
        lo: latents likewise, `[2, N, 256]`.
        hi: their upper half.
        rope: their rotary part `[2, N, 64]`, overwritten, once the scores are known, by probabilities `[2, M, N]`.
        stats: `[4, M]` maxima after the left and the right block, sums of the left and the right group.
    """

    q_lo: Any
    q_hi: Any
    q_rope: Any
    lo: Any
    hi: Any
    rope: Any
    stats: Any


class Bars(NamedTuple):
    """Barriers, four of each.

    Attributes:
        full: latents have arrived: lower halves of blocks 0 and 1, then upper halves with rotary parts.
        empty: they may be overwritten, likewise.
        ready: maximum and probabilities of the left, of the right block; sums of the left, of the right group.
    """

    full: Any
    empty: Any
    ready: Any


class KeyList(NamedTuple):
    """What a program gathers: `count` entries at `keys`, in `pairs` of blocks, of `T` latents."""

    keys: Any
    count: Any
    pairs: Any
    T: Any


class Place(NamedTuple):
    """Which rows a program writes: of a list and a block of heads, S queries in all, and their strides."""

    list_id: Any
    head_block: Any
    S: Any
    out_stride_s: Any
    out_stride_h: Any


def hopper_supports(q: torch.Tensor, kv: torch.Tensor, value_dim: int) -> bool:
    """Whether the kernel takes these tensors: latents of 512 + 64 entries, rows at multiples of 16 bytes."""
    aligned = kv.data_ptr() % 16 == 0 and q.data_ptr() % 16 == 0
    strides = (*kv.stride()[:2], *q.stride()[:3])
    return (
        gluon is not None
        and value_dim == VALUE_DIM
        and kv.shape[-1] == VALUE_DIM + ROPE_DIM
        and aligned
        and all(stride % 16 == 0 for stride in strides)
    )


def sparse_mla_hopper(q, kv, keys, counts, scale_log2, out, lse, group: int) -> None:
    """Fill `out` and `lse` from `keys` (a query's selection, or with `counts` the merged list of `group` queries)."""
    B, S, H, _ = q.shape
    lists, constants = triton.cdiv(S, group), list_constants(H, group, ROWS, keys.shape[-1])
    sizes = (S, lists, keys.shape[-1], kv.shape[1])
    strides = (*q.stride()[:3], *kv.stride()[:2], *keys.stride()[:2], *out.stride()[:3], *lse.stride()[:2])
    launcher(_sparse_mla_hopper_kernel, (B * lists * constants["HEAD_BLOCKS"],), q)(
        *(q, kv, keys, counts, out, lse, scale_log2), *sizes, *strides, **constants, num_warps=4
    )


if gluon is not None:
    M, N = gl.constexpr(ROWS), gl.constexpr(BLOCK_KEYS)
    PAIR = gl.constexpr(2 * BLOCK_KEYS)
    HALF, ROPE, ROPE_AT = gl.constexpr(HALF_VALUE), gl.constexpr(ROPE_DIM), gl.constexpr(VALUE_DIM)
    # Threads of a warp group, each of which says that its copies have arrived.
    GROUP_THREADS = gl.constexpr(128)
    RIGHT, GATHER = gl.constexpr(RIGHT_REGISTERS), gl.constexpr(GATHER_REGISTERS)
    _LN_2 = gl.constexpr(LN_2)
    # Of the scores [M, N], of the sums [M, 256], of the rows of both, and of probabilities that are multiplied.
    S_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KEYS, 16]))
    ACC_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_VALUE, 16]))
    S_ROWS = gl.constexpr(gl.SliceLayout(1, S_LAYOUT.value))
    ACC_ROWS = gl.constexpr(gl.SliceLayout(1, ACC_LAYOUT.value))
    P_LAYOUT = gl.constexpr(gl.DotOperandLayout(0, ACC_LAYOUT.value, 2))

    @gluon.jit(do_not_specialize=["S", "lists", "T", "lse_stride_b", "lse_stride_s"])
    def _sparse_mla_hopper_kernel(
        q,
        kv,
        keys,
        counts,
        out,
        lse,
        scale_log2,
        S,
        lists,
        K,
        T,
        q_stride_b,
        q_stride_s,
        q_stride_h,
        kv_stride_b,
        kv_stride_t,
        keys_stride_b,
        keys_stride_s,
        out_stride_b,
        out_stride_s,
        out_stride_h,
        lse_stride_b,
        lse_stride_s,
        H: gl.constexpr,
        GROUP: gl.constexpr,
        OWNER_SHIFT: gl.constexpr,
        HEAD_BLOCKS: gl.constexpr,
        BLOCK_K: gl.constexpr,
    ):
        dtype: gl.constexpr = q.dtype.element_ty
        form: gl.constexpr = ListForm(H, GROUP, OWNER_SHIFT, BLOCK_K)
        list_id, head_block, batch = program_place(lists, HEAD_BLOCKS)
        keys += batch * keys_stride_b + list_id.to(gl.int64) * keys_stride_s
        count = count_listed(keys, counts, batch, list_id, lists, K, form, 4)
        pairs = (count + PAIR - 1) // PAIR

        tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        q_lo = gl.allocate_shared_memory(dtype, [1, M, HALF], tile)
        q_hi = gl.allocate_shared_memory(dtype, [1, M, HALF], tile)
        q_rope = gl.allocate_shared_memory(dtype, [1, M, ROPE], tile)
        lo = gl.allocate_shared_memory(dtype, [2, N, HALF], tile)
        hi = gl.allocate_shared_memory(dtype, [2, N, HALF], tile)
        rope = gl.allocate_shared_memory(dtype, [2, N, ROPE], tile)
        stats = gl.allocate_shared_memory(gl.float32, [4, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(4):
            mbarrier.init(full.index(i), count=GROUP_THREADS)
            mbarrier.init(empty.index(i), count=1)
            mbarrier.init(ready.index(i), count=1)

        copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        rows = head_block * M + gl.arange(0, M, layout=gl.SliceLayout(1, copy))
        query, head, row_mask = row_of(rows, list_id, S, form)
        q_rows = q + batch * q_stride_b + query.to(gl.int64) * q_stride_s + head.to(gl.int64) * q_stride_h
        half = gl.arange(0, HALF, layout=gl.SliceLayout(0, copy))
        tail = gl.arange(0, ROPE, layout=gl.SliceLayout(0, copy))
        async_load(q_lo.index(0), q_rows[:, None] + half[None, :], mask=row_mask[:, None])
        async_load(q_hi.index(0), q_rows[:, None] + (HALF + half)[None, :], mask=row_mask[:, None])
        async_load(q_rope.index(0), q_rows[:, None] + (ROPE_AT + tail)[None, :], mask=row_mask[:, None])
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()

        out += batch * out_stride_b
        lse += batch * lse_stride_b
        kv += batch * kv_stride_b
        tiles = Tiles(q_lo, q_hi, q_rope, lo, hi, rope, stats)
        bars = Bars(full, empty, ready)
        listed = KeyList(keys, count, pairs, T)
        place = Place(list_id, head_block, S, out_stride_s, out_stride_h)
        gl.warp_specialize(
            [
                (_left_group, (tiles, bars, listed, scale_log2, out, lse, place, lse_stride_s, form)),
                (_right_group, (tiles, bars, listed, scale_log2, out, place, form)),
                (_gather_group, (tiles, bars, listed, kv, kv_stride_t, form)),
            ],
            [4, 4],  # warps
            [RIGHT, GATHER],
        )

    @gluon.jit
    def _gather_group(tiles, bars, listed, kv, kv_stride_t, form: gl.constexpr):
        lo, hi, rope, full, empty = tiles.lo, tiles.hi, tiles.rope, bars.full, bars.empty
        keys, count, pairs, T = listed
        copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        offs_n = gl.arange(0, N, layout=gl.SliceLayout(1, copy))
        half = gl.arange(0, HALF, layout=gl.SliceLayout(0, copy))
        tail = gl.arange(0, ROPE, layout=gl.SliceLayout(0, copy))
        next_key = gl.load(keys + offs_n, mask=offs_n < count, other=-1)
        for pair in range(pairs):
            free = (pair & 1) ^ 1
            for b in gl.static_range(2):
                key = next_key
                offs_k = pair * PAIR + (b + 1) * N + offs_n
                next_key = gl.load(keys + offs_k, mask=offs_k < count, other=-1)
                wanted = is_listed(key, T, form)[:, None]
                slot = slot_of(key, form)
                kv_rows = (kv + slot.to(gl.int64) * kv_stride_t)[:, None]
                # Entries of keys that are not listed are filled with zeros.
                mbarrier.wait(empty.index(b), free)
                async_load(lo.index(b), kv_rows + half[None, :], mask=wanted)
                async_copy.mbarrier_arrive(full.index(b), increment_count=False)
                mbarrier.wait(empty.index(2 + b), free)
                async_load(hi.index(b), kv_rows + (HALF + half)[None, :], mask=wanted)
                async_load(rope.index(b), kv_rows + (ROPE_AT + tail)[None, :], mask=wanted)
                async_copy.mbarrier_arrive(full.index(2 + b), increment_count=False)

    @gluon.jit
    def _scores(tiles, bars, b: gl.constexpr, phase, zero):
        """Scores `[M, N]` of block b of a pair, when its latents have arrived."""
        s = gl.zeros([M, N], gl.float32, S_LAYOUT)
        mbarrier.wait(bars.full.index(b), phase)
        fence_async_shared()
        q, latents = tiles.q_lo.index(zero), tiles.lo.index(b + zero).permute((1, 0))
        s = warpgroup_mma(q, latents, s, use_acc=False, is_async=True)
        mbarrier.wait(bars.full.index(2 + b), phase)
        fence_async_shared()
        s = warpgroup_mma(tiles.q_hi.index(zero), tiles.hi.index(b + zero).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(tiles.q_rope.index(zero), tiles.rope.index(b + zero).permute((1, 0)), s, is_async=True)
        return warpgroup_mma_wait(0, deps=[s])

    @gluon.jit
    def _mask(s, key, T, member, scale_log2, form: gl.constexpr):
        return gl.where(is_visible(key, T, member, form), s * scale_log2, float("-inf"))

    @gluon.jit
    def _finite(row_max):
        return gl.where(row_max == float("-inf"), 0.0, row_max)

    @gluon.jit
    def _left_group(tiles, bars, listed, scale_log2, out, lse, place, lse_stride_s, form: gl.constexpr):
        lo, rope, stats = tiles.lo, tiles.rope, tiles.stats
        keys, count, pairs, T = listed
        offs_n = gl.arange(0, N, layout=gl.SliceLayout(0, S_LAYOUT))
        member = gl.arange(0, M, layout=S_ROWS) // form.H
        row_max = gl.full([M], float("-inf"), gl.float32, S_ROWS)
        row_sum = gl.zeros([M], gl.float32, S_ROWS)
        acc = gl.zeros([M, HALF], gl.float32, ACC_LAYOUT)
        for pair in range(pairs):
            phase = pair & 1
            zero = opaque_zero(pair)
            offs_k = pair * PAIR + offs_n
            key = gl.load(keys + offs_k, mask=offs_k < count, other=-1)
            s = _scores(tiles, bars, 0, phase, zero)
            s = _mask(s, key, T, member, scale_log2, form)
            left_max = gl.maximum(row_max, gl.max(s, 1))
            reference = _finite(left_max)
            p = gl.exp2(s - reference[:, None])
            alpha = gl.exp2(row_max - reference)
            row_sum = row_sum * alpha + gl.sum(p, 1)
            p16 = p.to(rope.dtype)
            rope.index(0).store(p16)
            stats.index(0).store(left_max)
            fence_async_shared()
            barrier()
            mbarrier.arrive(bars.ready.index(0), count=1)
            acc = acc * gl.convert_layout(alpha, ACC_ROWS)[:, None]
            acc = warpgroup_mma(gl.convert_layout(p16, P_LAYOUT), lo.index(0 + zero), acc, is_async=True)

            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(bars.empty.index(0), count=1)
            mbarrier.wait(bars.ready.index(1), phase)
            right_max = stats.index(1).load(S_ROWS)
            alpha = gl.exp2(left_max - _finite(right_max))
            row_sum = row_sum * alpha
            row_max = right_max
            acc = acc * gl.convert_layout(alpha, ACC_ROWS)[:, None]
            acc = warpgroup_mma(rope.index(1 + zero), lo.index(1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(bars.empty.index(1), count=1)

        stats.index(2).store(row_sum)
        barrier()
        mbarrier.arrive(bars.ready.index(2), count=1)
        mbarrier.wait(bars.ready.index(3), 0)
        row_sum = row_sum + stats.index(3).load(S_ROWS)
        offs_m = place.head_block * M + gl.arange(0, M, layout=S_ROWS)
        query, head, row_mask = row_of(offs_m, place.list_id, place.S, form)
        row_lse = gl.where(row_sum > 0, (row_max + gl.log2(row_sum)) * _LN_2, float("-inf"))
        gl.store(lse + query.to(gl.int64) * lse_stride_s + head, row_lse, mask=row_mask)
        _store_half(acc, row_sum, out, place, 0, form)

    @gluon.jit
    def _right_group(tiles, bars, listed, scale_log2, out, place, form: gl.constexpr):
        hi, rope, stats = tiles.hi, tiles.rope, tiles.stats
        keys, count, pairs, T = listed
        offs_n = gl.arange(0, N, layout=gl.SliceLayout(0, S_LAYOUT))
        member = gl.arange(0, M, layout=S_ROWS) // form.H
        row_max = gl.full([M], float("-inf"), gl.float32, S_ROWS)
        row_sum = gl.zeros([M], gl.float32, S_ROWS)
        acc = gl.zeros([M, HALF], gl.float32, ACC_LAYOUT)
        for pair in range(pairs):
            phase = pair & 1
            zero = opaque_zero(pair)
            offs_k = pair * PAIR + N + offs_n
            key = gl.load(keys + offs_k, mask=offs_k < count, other=-1)
            s = _scores(tiles, bars, 1, phase, zero)
            mbarrier.wait(bars.ready.index(0), phase)
            left_max = stats.index(0).load(S_ROWS)
            alpha = gl.exp2(row_max - _finite(left_max))
            acc = acc * gl.convert_layout(alpha, ACC_ROWS)[:, None]
            acc = warpgroup_mma(rope.index(0 + zero), hi.index(0), acc, is_async=True)

            # The softmax of this block runs while the tensor cores work on the left group's.
            s = _mask(s, key, T, member, scale_log2, form)
            right_max = gl.maximum(left_max, gl.max(s, 1))
            reference = _finite(right_max)
            p = gl.exp2(s - reference[:, None])
            beta = gl.exp2(left_max - reference)
            row_sum = row_sum * alpha * beta + gl.sum(p, 1)
            row_max = right_max
            p16 = p.to(rope.dtype)
            rope.index(1).store(p16)
            stats.index(1).store(right_max)
            fence_async_shared()
            barrier()
            mbarrier.arrive(bars.ready.index(1), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(bars.empty.index(2), count=1)
            acc = acc * gl.convert_layout(beta, ACC_ROWS)[:, None]
            acc = warpgroup_mma(gl.convert_layout(p16, P_LAYOUT), hi.index(1 + zero), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(bars.empty.index(3), count=1)

        stats.index(3).store(row_sum)
        barrier()
        mbarrier.arrive(bars.ready.index(3), count=1)
        mbarrier.wait(bars.ready.index(2), 0)
        row_sum = row_sum + stats.index(2).load(S_ROWS)
        _store_half(acc, row_sum, out, place, HALF, form)

    @gluon.jit
    def _store_half(acc, row_sum, out, place, column: gl.constexpr, form: gl.constexpr):
        """Write the columns from `column` on."""
        row_sum = gl.convert_layout(row_sum, ACC_ROWS)
        acc = acc * gl.where(row_sum > 0, 1.0 / row_sum, 0.0)[:, None]
        offs_m = place.head_block * M + gl.arange(0, M, layout=ACC_ROWS)
        query, head, row_mask = row_of(offs_m, place.list_id, place.S, form)
        out_rows = out + query.to(gl.int64) * place.out_stride_s + head * place.out_stride_h
        offs_v = column + gl.arange(0, HALF, layout=gl.SliceLayout(0, ACC_LAYOUT))
        gl.store(out_rows[:, None] + offs_v[None, :], acc.to(out.dtype.element_ty), mask=row_mask[:, None])
