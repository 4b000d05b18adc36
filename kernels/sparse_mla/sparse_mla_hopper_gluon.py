"""Sparse MLA prefill for Hopper (sm90) in Gluon, for latents of 512 + 64 entries: 64 rows, pairs of 64-key blocks.

Three warp groups a program. The gatherer copies latents into two buffers. The left group scores even blocks and owns
value columns 0..255, the right group scores odd blocks and owns columns 256..511; each hands its probabilities to the
other through shared memory, in the place of the block's rotary part, which nobody needs once the scores are known.
The running maximum goes left -> right -> left, so both groups scale their halves alike (source of the schedule: the
"seesaw" of FlashMLA's design notes; the code is our own).

Legend: as `sparse_mla_triton.py`; M = 64 rows, N = 64 keys.
"""

from __future__ import annotations

import torch

from ..common.kernel_launch import launcher

try:
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    # Renamed after Triton 3.6.
    async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier
except (ImportError, AttributeError):
    gluon = None

ROWS = 64
VALUE_DIM, ROPE_DIM = 512, 64


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


def sparse_mla_hopper(q, kv, keys, counts, scale_log2, out, lse, group: int, owner_shift: int) -> None:
    """Fill `out` and `lse` from `keys` (a query's selection, or with `counts` the merged list of `group` queries)."""
    B, S, H, _ = q.shape
    lists = triton.cdiv(S, group)
    head_blocks = 1 if group > 1 else triton.cdiv(H, ROWS)
    launcher(_sparse_mla_hopper_kernel, (B * lists * head_blocks,), q)(
        q,
        kv,
        keys,
        counts,
        out,
        lse,
        scale_log2,
        S,
        lists,
        keys.shape[-1],
        kv.shape[1],
        *q.stride()[:3],
        *kv.stride()[:2],
        *keys.stride()[:2],
        *out.stride()[:3],
        *lse.stride()[:2],
        H=H,
        GROUP=group,
        OWNER_SHIFT=owner_shift,
        HEAD_BLOCKS=head_blocks,
        BLOCK_K=triton.next_power_of_2(keys.shape[-1]),
        num_warps=4,
    )


if gluon is not None:

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
        # Head blocks of one query are neighbours: the second gather finds the latents in L2.
        list_id = gl.program_id(0) // HEAD_BLOCKS
        head_block = gl.program_id(0) % HEAD_BLOCKS
        batch = (list_id // lists).to(gl.int64)
        list_id = list_id % lists
        keys += batch * keys_stride_b + list_id.to(gl.int64) * keys_stride_s
        if GROUP > 1:
            count = gl.load(counts + batch * lists + list_id)
        else:
            offs_all = gl.arange(0, BLOCK_K, layout=gl.BlockedLayout([4], [32], [4], [0]))
            all_keys = gl.load(keys + offs_all, mask=offs_all < K, other=-1)
            count = gl.max(gl.where(all_keys >= 0, offs_all + 1, 0), 0)
        pairs = (count + 127) // 128

        tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        q_lo = gl.allocate_shared_memory(dtype, [1, 64, 256], tile)
        q_hi = gl.allocate_shared_memory(dtype, [1, 64, 256], tile)
        q_rope = gl.allocate_shared_memory(dtype, [1, 64, 64], tile)
        lo = gl.allocate_shared_memory(dtype, [2, 64, 256], tile)
        hi = gl.allocate_shared_memory(dtype, [2, 64, 256], tile)
        rope = gl.allocate_shared_memory(dtype, [2, 64, 64], tile)
        stats = gl.allocate_shared_memory(gl.float32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(4):
            mbarrier.init(full.index(i), count=128)
            mbarrier.init(empty.index(i), count=1)
            mbarrier.init(ready.index(i), count=1)

        copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        rows = head_block * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, copy))
        query, head, row_mask = row_of(rows, list_id, S, H, GROUP)
        q_rows = q + batch * q_stride_b + query.to(gl.int64) * q_stride_s + head.to(gl.int64) * q_stride_h
        half = gl.arange(0, 256, layout=gl.SliceLayout(0, copy))
        tail = gl.arange(0, 64, layout=gl.SliceLayout(0, copy))
        async_load(q_lo.index(0), q_rows[:, None] + half[None, :], mask=row_mask[:, None])
        async_load(q_hi.index(0), q_rows[:, None] + (256 + half)[None, :], mask=row_mask[:, None])
        async_load(q_rope.index(0), q_rows[:, None] + (512 + tail)[None, :], mask=row_mask[:, None])
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()

        out += batch * out_stride_b
        lse += batch * lse_stride_b
        kv += batch * kv_stride_b
        gl.warp_specialize(
            [
                (
                    _left_group,
                    (
                        q_lo,
                        q_hi,
                        q_rope,
                        lo,
                        hi,
                        rope,
                        stats,
                        full,
                        empty,
                        ready,
                        keys,
                        count,
                        pairs,
                        T,
                        scale_log2,
                        out,
                        lse,
                        list_id,
                        head_block,
                        S,
                        out_stride_s,
                        out_stride_h,
                        lse_stride_s,
                        H,
                        GROUP,
                        OWNER_SHIFT,
                    ),
                ),
                (
                    _right_group,
                    (
                        q_lo,
                        q_hi,
                        q_rope,
                        lo,
                        hi,
                        rope,
                        stats,
                        full,
                        empty,
                        ready,
                        keys,
                        count,
                        pairs,
                        T,
                        scale_log2,
                        out,
                        list_id,
                        head_block,
                        S,
                        out_stride_s,
                        out_stride_h,
                        H,
                        GROUP,
                        OWNER_SHIFT,
                    ),
                ),
                (
                    _gather_group,
                    (lo, hi, rope, full, empty, keys, count, pairs, kv, kv_stride_t, T, GROUP, OWNER_SHIFT),
                ),
            ],
            [4, 4],
            [216, 72],
        )

    @gluon.jit
    def is_listed(key, T, GROUP: gl.constexpr):
        """Which entries are one of T keys; merged lists hold no others."""
        listed = key >= 0
        if GROUP == 1:
            listed = listed & (key < T)
        return listed

    @gluon.jit
    def row_of(rows, list_id, S, H: gl.constexpr, GROUP: gl.constexpr):
        """Query and head of each row, and which rows exist."""
        if GROUP > 1:
            query, head = list_id * GROUP + rows // H, rows % H
            mask = (rows < GROUP * H) & (query < S)
        else:
            query, head = list_id + rows * 0, rows
            mask = rows < H
        return query, head, mask

    @gluon.jit
    def _gather_group(
        lo,
        hi,
        rope,
        full,
        empty,
        keys,
        count,
        pairs,
        kv,
        kv_stride_t,
        T,
        GROUP: gl.constexpr,
        OWNER_SHIFT: gl.constexpr,
    ):
        copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        offs_n = gl.arange(0, 64, layout=gl.SliceLayout(1, copy))
        half = gl.arange(0, 256, layout=gl.SliceLayout(0, copy))
        tail = gl.arange(0, 64, layout=gl.SliceLayout(0, copy))
        next_key = gl.load(keys + offs_n, mask=offs_n < count, other=-1)
        for pair in range(pairs):
            free = (pair & 1) ^ 1
            for b in gl.static_range(2):
                key = next_key
                offs_k = pair * 128 + (b + 1) * 64 + offs_n
                next_key = gl.load(keys + offs_k, mask=offs_k < count, other=-1)
                listed = is_listed(key, T, GROUP)[:, None]
                slot = key
                if GROUP > 1:
                    slot = key & ((1 << OWNER_SHIFT) - 1)
                kv_rows = (kv + slot.to(gl.int64) * kv_stride_t)[:, None]
                # Entries of keys that are not listed are filled with zeros.
                mbarrier.wait(empty.index(b), free)
                async_load(lo.index(b), kv_rows + half[None, :], mask=listed)
                async_copy.mbarrier_arrive(full.index(b), increment_count=False)
                mbarrier.wait(empty.index(2 + b), free)
                async_load(hi.index(b), kv_rows + (256 + half)[None, :], mask=listed)
                async_load(rope.index(b), kv_rows + (512 + tail)[None, :], mask=listed)
                async_copy.mbarrier_arrive(full.index(2 + b), increment_count=False)

    @gluon.jit
    def opaque_zero(varying):
        """Zero that the compiler does not see through, anew whenever `varying` changes."""
        # Keeps the compiler from hoisting the wgmma descriptors out of the loop: 64-bit each, they would be spilled.
        return gl.inline_asm_elementwise("mov.b32 $0, 0; // $1", "=r,r", [varying], gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def _scores(q_lo, q_hi, q_rope, lo, hi, rope, full, b: gl.constexpr, phase, zero, layout: gl.constexpr):
        s = gl.zeros([64, 64], gl.float32, layout)
        mbarrier.wait(full.index(b), phase)
        fence_async_shared()
        s = warpgroup_mma(q_lo.index(zero), lo.index(b + zero).permute((1, 0)), s, use_acc=False, is_async=True)
        mbarrier.wait(full.index(2 + b), phase)
        fence_async_shared()
        s = warpgroup_mma(q_hi.index(zero), hi.index(b + zero).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_rope.index(zero), rope.index(b + zero).permute((1, 0)), s, is_async=True)
        return warpgroup_mma_wait(0, deps=[s])

    @gluon.jit
    def _mask(s, key, T, member, scale_log2, GROUP: gl.constexpr, OWNER_SHIFT: gl.constexpr):
        visible = is_listed(key, T, GROUP)[None, :]
        if GROUP > 1:
            owned = (key[None, :] >> (OWNER_SHIFT + member)[:, None]) & 1
            visible = visible & (owned != 0)
        return gl.where(visible, s * scale_log2, float("-inf"))

    @gluon.jit
    def _finite(row_max):
        return gl.where(row_max == float("-inf"), 0.0, row_max)

    @gluon.jit
    def _left_group(
        q_lo,
        q_hi,
        q_rope,
        lo,
        hi,
        rope,
        stats,
        full,
        empty,
        ready,
        keys,
        count,
        pairs,
        T,
        scale_log2,
        out,
        lse,
        list_id,
        head_block,
        S,
        out_stride_s,
        out_stride_h,
        lse_stride_s,
        H: gl.constexpr,
        GROUP: gl.constexpr,
        OWNER_SHIFT: gl.constexpr,
    ):
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
        acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
        s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
        acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
        p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
        offs_n = gl.arange(0, 64, layout=gl.SliceLayout(0, s_layout))
        member = gl.arange(0, 64, layout=s_rows) // H
        row_max = gl.full([64], float("-inf"), gl.float32, s_rows)
        row_sum = gl.zeros([64], gl.float32, s_rows)
        acc = gl.zeros([64, 256], gl.float32, acc_layout)
        for pair in range(pairs):
            phase = pair & 1
            zero = opaque_zero(pair)
            offs_k = pair * 128 + offs_n
            key = gl.load(keys + offs_k, mask=offs_k < count, other=-1)
            s = _scores(q_lo, q_hi, q_rope, lo, hi, rope, full, 0, phase, zero, s_layout)
            s = _mask(s, key, T, member, scale_log2, GROUP, OWNER_SHIFT)
            left_max = gl.maximum(row_max, gl.max(s, 1))
            reference = _finite(left_max)
            p = gl.exp2(s - reference[:, None])
            alpha = gl.exp2(row_max - reference)
            row_sum = row_sum * alpha + gl.sum(p, 1)
            p16 = p.to(lo.dtype)
            rope.index(0).store(p16)
            stats.index(0).store(left_max)
            fence_async_shared()
            barrier()
            mbarrier.arrive(ready.index(0), count=1)
            acc = acc * gl.convert_layout(alpha, acc_rows)[:, None]
            acc = warpgroup_mma(gl.convert_layout(p16, p_layout), lo.index(0 + zero), acc, is_async=True)

            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(empty.index(0), count=1)
            mbarrier.wait(ready.index(1), phase)
            right_max = stats.index(1).load(s_rows)
            alpha = gl.exp2(left_max - _finite(right_max))
            row_sum = row_sum * alpha
            row_max = right_max
            acc = acc * gl.convert_layout(alpha, acc_rows)[:, None]
            acc = warpgroup_mma(rope.index(1 + zero), lo.index(1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(empty.index(1), count=1)

        stats.index(2).store(row_sum)
        barrier()
        mbarrier.arrive(ready.index(2), count=1)
        mbarrier.wait(ready.index(3), 0)
        row_sum = row_sum + stats.index(3).load(s_rows)
        offs_m = head_block * 64 + gl.arange(0, 64, layout=s_rows)
        query, head, row_mask = row_of(offs_m, list_id, S, H, GROUP)
        row_lse = gl.where(row_sum > 0, (row_max + gl.log2(row_sum)) * 0.6931471805599453, float("-inf"))
        gl.store(lse + query.to(gl.int64) * lse_stride_s + head, row_lse, mask=row_mask)
        _store_half(acc, row_sum, out, list_id, head_block, S, out_stride_s, out_stride_h, 0, H, GROUP, acc_layout)

    @gluon.jit
    def _right_group(
        q_lo,
        q_hi,
        q_rope,
        lo,
        hi,
        rope,
        stats,
        full,
        empty,
        ready,
        keys,
        count,
        pairs,
        T,
        scale_log2,
        out,
        list_id,
        head_block,
        S,
        out_stride_s,
        out_stride_h,
        H: gl.constexpr,
        GROUP: gl.constexpr,
        OWNER_SHIFT: gl.constexpr,
    ):
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
        acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
        s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
        acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
        p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
        offs_n = gl.arange(0, 64, layout=gl.SliceLayout(0, s_layout))
        member = gl.arange(0, 64, layout=s_rows) // H
        row_max = gl.full([64], float("-inf"), gl.float32, s_rows)
        row_sum = gl.zeros([64], gl.float32, s_rows)
        acc = gl.zeros([64, 256], gl.float32, acc_layout)
        for pair in range(pairs):
            phase = pair & 1
            zero = opaque_zero(pair)
            offs_k = pair * 128 + 64 + offs_n
            key = gl.load(keys + offs_k, mask=offs_k < count, other=-1)
            s = _scores(q_lo, q_hi, q_rope, lo, hi, rope, full, 1, phase, zero, s_layout)
            mbarrier.wait(ready.index(0), phase)
            left_max = stats.index(0).load(s_rows)
            alpha = gl.exp2(row_max - _finite(left_max))
            acc = acc * gl.convert_layout(alpha, acc_rows)[:, None]
            acc = warpgroup_mma(rope.index(0 + zero), hi.index(0), acc, is_async=True)

            # The softmax of this block runs while the tensor cores work on the left group's.
            s = _mask(s, key, T, member, scale_log2, GROUP, OWNER_SHIFT)
            right_max = gl.maximum(left_max, gl.max(s, 1))
            reference = _finite(right_max)
            p = gl.exp2(s - reference[:, None])
            beta = gl.exp2(left_max - reference)
            row_sum = row_sum * alpha * beta + gl.sum(p, 1)
            row_max = right_max
            p16 = p.to(lo.dtype)
            rope.index(1).store(p16)
            stats.index(1).store(right_max)
            fence_async_shared()
            barrier()
            mbarrier.arrive(ready.index(1), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(empty.index(2), count=1)
            acc = acc * gl.convert_layout(beta, acc_rows)[:, None]
            acc = warpgroup_mma(gl.convert_layout(p16, p_layout), hi.index(1 + zero), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(empty.index(3), count=1)

        stats.index(3).store(row_sum)
        barrier()
        mbarrier.arrive(ready.index(3), count=1)
        mbarrier.wait(ready.index(2), 0)
        row_sum = row_sum + stats.index(2).load(s_rows)
        _store_half(acc, row_sum, out, list_id, head_block, S, out_stride_s, out_stride_h, 256, H, GROUP, acc_layout)

    @gluon.jit
    def _store_half(
        acc,
        row_sum,
        out,
        list_id,
        head_block,
        S,
        out_stride_s,
        out_stride_h,
        column: gl.constexpr,
        H: gl.constexpr,
        GROUP: gl.constexpr,
        layout: gl.constexpr,
    ):
        row_sum = gl.convert_layout(row_sum, gl.SliceLayout(1, layout))
        acc = acc * gl.where(row_sum > 0, 1.0 / row_sum, 0.0)[:, None]
        offs_m = head_block * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        query, head, row_mask = row_of(offs_m, list_id, S, H, GROUP)
        out_rows = out + query.to(gl.int64) * out_stride_s + head * out_stride_h
        offs_v = column + gl.arange(0, 256, layout=gl.SliceLayout(0, layout))
        gl.store(out_rows[:, None] + offs_v[None, :], acc.to(out.dtype.element_ty), mask=row_mask[:, None])
