"""Sparse MLA backward for Hopper (sm90) in Gluon, for latents of 512 + 64 entries: 64 rows, blocks of 64 keys.

Queries, output gradients, one block of latents and the block's probabilities and score gradients fill the shared
memory; the gradient of the queries stays in registers, that of the latents leaves in pieces of 128 columns while the
next block's latents arrive. Two warp groups share every product, each has half of the columns.

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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ..common.kernel_constants import LOG2_E
from ..common.kernel_launch import launcher
from ..common.triton_support import triton
from .sparse_mla_hopper_gluon import ROPE_DIM, VALUE_DIM, hopper_supports
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

# Rows of a program, and keys of a block.
ROWS, BLOCK_KEYS = 64, 64
# Columns of a piece of latents: four make the value, and each is a buffer and a product of its own.
PIECE_COLUMNS = VALUE_DIM // 4


class Entries(NamedTuple):
    """A program's list: `count` entries at `keys`, of `T` latents at `kv`, `kv_stride_t` apart."""

    kv: Any
    kv_stride_t: Any
    T: Any
    keys: Any
    count: Any


class Threads(NamedTuple):
    """Which keys and columns a thread copies, of a piece and of the rotary part."""

    keys: Any
    keys_rope: Any
    columns: Any
    columns_rope: Any


def hopper_backward_supports(q: torch.Tensor, kv: torch.Tensor, grad_out: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors: latents of 512 + 64 entries, rows at multiples of 16 bytes."""
    aligned = grad_out.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in grad_out.stride()[:3])
    return gluon is not None and aligned and hopper_supports(q, kv, grad_out.shape[-1])


def sparse_mla_backward_hopper(
    q, kv, keys, counts, grad_out, lse, delta, scale, scale_log2, grad_q, grad_kv, per_entry: bool, group: int
) -> None:
    """Fill `grad_q`; add to `grad_kv` [B, T, 576], or if `per_entry` write a row for every list entry there."""
    B, S, H, _ = q.shape
    lists, constants = triton.cdiv(S, group), list_constants(H, group, ROWS, keys.shape[-1])
    launcher(_sparse_mla_backward_hopper_kernel, (B * lists * constants["HEAD_BLOCKS"],), q)(
        *(q, kv, keys, counts, grad_out, lse, delta, grad_q, grad_kv, scale, scale_log2),
        *(S, lists, keys.shape[-1], kv.shape[1]),
        *(*q.stride()[:3], *kv.stride()[:2], *keys.stride()[:2], *grad_out.stride()[:3], *lse.stride()[:2]),
        *(*grad_q.stride()[:3], grad_kv.stride(0)),
        **constants,
        PER_ENTRY=per_entry,
        num_warps=8,
    )


if gluon is not None:
    M, N = gl.constexpr(ROWS), gl.constexpr(BLOCK_KEYS)
    PIECE, ROPE, ROPE_AT = gl.constexpr(PIECE_COLUMNS), gl.constexpr(ROPE_DIM), gl.constexpr(VALUE_DIM)
    WIDTH = gl.constexpr(VALUE_DIM + ROPE_DIM)
    _LOG2_E = gl.constexpr(LOG2_E)

    @gluon.jit(do_not_specialize=["S", "lists", "T", "lse_stride_b"])
    def _sparse_mla_backward_hopper_kernel(
        q,
        kv,
        keys,
        counts,
        grad_out,
        lse,
        delta,
        grad_q,
        grad_kv,
        scale,
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
        do_stride_b,
        do_stride_s,
        do_stride_h,
        lse_stride_b,
        lse_stride_s,
        dq_stride_b,
        dq_stride_s,
        dq_stride_h,
        dkv_stride_b,
        H: gl.constexpr,
        GROUP: gl.constexpr,
        OWNER_SHIFT: gl.constexpr,
        HEAD_BLOCKS: gl.constexpr,
        BLOCK_K: gl.constexpr,
        PER_ENTRY: gl.constexpr,
    ):
        dtype: gl.constexpr = q.dtype.element_ty
        form: gl.constexpr = ListForm(H, GROUP, OWNER_SHIFT, BLOCK_K)
        list_id, head_block, batch = program_place(lists, HEAD_BLOCKS)
        keys += batch * keys_stride_b + list_id.to(gl.int64) * keys_stride_s
        count = count_listed(keys, counts, batch, list_id, lists, K, form, 8)

        tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        q_v = gl.allocate_shared_memory(dtype, [4, M, PIECE], tile)
        q_r = gl.allocate_shared_memory(dtype, [1, M, ROPE], tile)
        do_v = gl.allocate_shared_memory(dtype, [4, M, PIECE], tile)
        # Apart, so that the compiler sees that copies into them do not overlap, and puts no barriers between.
        kv_0 = gl.allocate_shared_memory(dtype, [1, N, PIECE], tile)
        kv_1 = gl.allocate_shared_memory(dtype, [1, N, PIECE], tile)
        kv_2 = gl.allocate_shared_memory(dtype, [1, N, PIECE], tile)
        kv_3 = gl.allocate_shared_memory(dtype, [1, N, PIECE], tile)
        kv_v = (kv_0, kv_1, kv_2, kv_3)
        kv_r = gl.allocate_shared_memory(dtype, [1, N, ROPE], tile)
        p_sm = gl.allocate_shared_memory(dtype, [1, M, N], tile)
        ds_sm = gl.allocate_shared_memory(dtype, [1, M, N], tile)

        copy: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
        copy_r: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
        wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
        narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
        cols = gl.arange(0, PIECE, layout=gl.SliceLayout(0, copy))
        cols_r = gl.arange(0, ROPE, layout=gl.SliceLayout(0, copy_r))

        rows = head_block * M + gl.arange(0, M, layout=gl.SliceLayout(1, copy))
        query, head, row_mask = row_of(rows, list_id, S, form)
        q_rows = q + batch * q_stride_b + query.to(gl.int64) * q_stride_s + head.to(gl.int64) * q_stride_h
        do_rows = grad_out + batch * do_stride_b + query.to(gl.int64) * do_stride_s + head.to(gl.int64) * do_stride_h
        for c in gl.static_range(4):
            async_load(q_v.index(c), q_rows[:, None] + (c * PIECE + cols)[None, :], mask=row_mask[:, None])
            async_load(do_v.index(c), do_rows[:, None] + (c * PIECE + cols)[None, :], mask=row_mask[:, None])
        rows = head_block * M + gl.arange(0, M, layout=gl.SliceLayout(1, copy_r))
        query, head, row_mask = row_of(rows, list_id, S, form)
        q_rows = q + batch * q_stride_b + query.to(gl.int64) * q_stride_s + head.to(gl.int64) * q_stride_h
        async_load(q_r.index(0), q_rows[:, None] + (ROPE_AT + cols_r)[None, :], mask=row_mask[:, None])

        rows = head_block * M + gl.arange(0, M, layout=gl.SliceLayout(1, narrow))
        query, head, row_mask = row_of(rows, list_id, S, form)
        lse_rows = batch * lse_stride_b + query.to(gl.int64) * lse_stride_s + head
        # Rows that do not exist, and queries without keys, get probabilities of zero.
        row_lse = gl.load(lse + lse_rows, mask=row_mask, other=float("inf"))
        row_lse = gl.where(row_lse == float("-inf"), float("inf"), row_lse) * _LOG2_E
        row_delta = gl.load(delta + lse_rows, mask=row_mask, other=0.0)
        member = gl.arange(0, M, layout=gl.SliceLayout(1, narrow)) // H

        kv += batch * kv_stride_b
        if PER_ENTRY:
            entry = (gl.program_id(0) // (HEAD_BLOCKS * lists) * lists + list_id) * HEAD_BLOCKS + head_block
            grad_kv += entry.to(gl.int64) * K * WIDTH
        else:
            grad_kv += batch * dkv_stride_b
        offs_copy = gl.arange(0, N, layout=gl.SliceLayout(1, copy))
        offs_copy_r = gl.arange(0, N, layout=gl.SliceLayout(1, copy_r))
        offs_s = gl.arange(0, N, layout=gl.SliceLayout(0, narrow))
        offs_wide = gl.arange(0, M, layout=gl.SliceLayout(1, wide))
        offs_narrow = gl.arange(0, M, layout=gl.SliceLayout(1, narrow))
        cols_wide = gl.arange(0, PIECE, layout=gl.SliceLayout(0, wide))
        cols_narrow = gl.arange(0, ROPE, layout=gl.SliceLayout(0, narrow))

        dq_0 = gl.zeros([M, PIECE], gl.float32, wide)
        dq_1 = gl.zeros([M, PIECE], gl.float32, wide)
        dq_2 = gl.zeros([M, PIECE], gl.float32, wide)
        dq_3 = gl.zeros([M, PIECE], gl.float32, wide)
        dq_r = gl.zeros([M, ROPE], gl.float32, narrow)
        entries = Entries(kv, kv_stride_t, T, keys, count)
        threads = Threads(offs_copy, offs_copy_r, cols, cols_r)
        _gather(kv_v, kv_r, entries, 0, threads, form)
        for block in range((count + N - 1) // N):
            zero = opaque_zero(block)
            first = block * N
            async_copy.wait_group(0)
            fence_async_shared()
            barrier()
            s = gl.zeros([M, N], gl.float32, narrow)
            dp = gl.zeros([M, N], gl.float32, narrow)
            for c in gl.static_range(4):
                keys_t = kv_v[c].index(zero).permute((1, 0))
                s = warpgroup_mma(q_v.index(c + zero), keys_t, s, use_acc=c > 0, is_async=True)
                dp = warpgroup_mma(do_v.index(c + zero), keys_t, dp, use_acc=c > 0, is_async=True)
            s = warpgroup_mma(q_r.index(zero), kv_r.index(zero).permute((1, 0)), s, is_async=True)
            key = gl.load(keys + first + offs_s, mask=first + offs_s < count, other=-1)
            visible = is_visible(key, T, member, form)
            s, dp = warpgroup_mma_wait(0, deps=[s, dp])
            p = gl.where(visible, gl.exp2(s * scale_log2 - row_lse[:, None]), 0.0)
            ds = p * (dp - row_delta[:, None]) * scale
            p_sm.index(0).store(p.to(dtype))
            ds_sm.index(0).store(ds.to(dtype))
            fence_async_shared()
            barrier()
            dq_0 = warpgroup_mma(ds_sm.index(zero), kv_0.index(zero), dq_0, is_async=True)
            dq_1 = warpgroup_mma(ds_sm.index(zero), kv_1.index(zero), dq_1, is_async=True)
            dq_2 = warpgroup_mma(ds_sm.index(zero), kv_2.index(zero), dq_2, is_async=True)
            dq_3 = warpgroup_mma(ds_sm.index(zero), kv_3.index(zero), dq_3, is_async=True)
            dq_r = warpgroup_mma(ds_sm.index(zero), kv_r.index(zero), dq_r, is_async=True)
            # The tensor cores work on the next piece while the last one is added to memory.
            dkv_r = gl.zeros([N, ROPE], gl.float32, narrow)
            dkv_r = warpgroup_mma(
                ds_sm.index(zero).permute((1, 0)), q_r.index(zero), dkv_r, use_acc=False, is_async=True
            )
            dq_0, dq_1, dq_2, dq_3, dq_r = warpgroup_mma_wait(1, deps=[dq_0, dq_1, dq_2, dq_3, dq_r])
            barrier()
            # The block has been read for the last time: the next one arrives behind the rest of the work.
            _gather(kv_v, kv_r, entries, first + N, threads, form)
            even = _grad_piece(ds_sm, p_sm, q_v, do_v, 0, zero, wide)
            dkv_r = warpgroup_mma_wait(2, deps=[dkv_r])
            row_ptr, listed = _grad_rows(grad_kv, entries, first, offs_narrow, form, PER_ENTRY)
            _add_or_store(row_ptr[:, None] + (ROPE_AT + cols_narrow)[None, :], dkv_r, listed[:, None], PER_ENTRY)
            odd = _grad_piece(ds_sm, p_sm, q_v, do_v, 1, zero, wide)
            even = warpgroup_mma_wait(2, deps=[even])
            row_ptr, listed = _grad_rows(grad_kv, entries, first, offs_wide, form, PER_ENTRY)
            pointers, listed = row_ptr[:, None] + cols_wide[None, :], listed[:, None]
            _add_or_store(pointers, even, listed, PER_ENTRY)
            even = _grad_piece(ds_sm, p_sm, q_v, do_v, 2, zero, wide)
            odd = warpgroup_mma_wait(2, deps=[odd])
            _add_or_store(pointers + PIECE, odd, listed, PER_ENTRY)
            odd = _grad_piece(ds_sm, p_sm, q_v, do_v, 3, zero, wide)
            even = warpgroup_mma_wait(2, deps=[even])
            _add_or_store(pointers + 2 * PIECE, even, listed, PER_ENTRY)
            odd = warpgroup_mma_wait(0, deps=[odd])
            _add_or_store(pointers + 3 * PIECE, odd, listed, PER_ENTRY)
        async_copy.wait_group(0)

        rows = head_block * M + offs_wide
        query, head, row_mask = row_of(rows, list_id, S, form)
        row_ptr = grad_q + batch * dq_stride_b + query.to(gl.int64) * dq_stride_s + head * dq_stride_h
        gl.store(row_ptr[:, None] + cols_wide[None, :], dq_0.to(dtype), mask=row_mask[:, None])
        gl.store(row_ptr[:, None] + (PIECE + cols_wide)[None, :], dq_1.to(dtype), mask=row_mask[:, None])
        gl.store(row_ptr[:, None] + (2 * PIECE + cols_wide)[None, :], dq_2.to(dtype), mask=row_mask[:, None])
        gl.store(row_ptr[:, None] + (3 * PIECE + cols_wide)[None, :], dq_3.to(dtype), mask=row_mask[:, None])
        query, head, row_mask = row_of(head_block * M + offs_narrow, list_id, S, form)
        row_ptr = grad_q + batch * dq_stride_b + query.to(gl.int64) * dq_stride_s + head * dq_stride_h
        gl.store(row_ptr[:, None] + (ROPE_AT + cols_narrow)[None, :], dq_r.to(dtype), mask=row_mask[:, None])

    @gluon.jit
    def _gather(kv_v, kv_r, entries, first, threads, form: gl.constexpr):
        """Start to copy the latents of the block at `first`, zeros for entries that are not listed."""
        kv, kv_stride_t, T, keys, count = entries
        key = gl.load(keys + first + threads.keys, mask=first + threads.keys < count, other=-1)
        key_r = gl.load(keys + first + threads.keys_rope, mask=first + threads.keys_rope < count, other=-1)
        slot, slot_r = slot_of(key, form), slot_of(key_r, form)
        kv_rows = (kv + slot.to(gl.int64) * kv_stride_t)[:, None]
        for c in gl.static_range(4):
            columns = (c * PIECE + threads.columns)[None, :]
            async_load(kv_v[c].index(0), kv_rows + columns, mask=is_listed(key, T, form)[:, None])
        kv_rows = (kv + slot_r.to(gl.int64) * kv_stride_t)[:, None]
        columns = (ROPE_AT + threads.columns_rope)[None, :]
        async_load(kv_r.index(0), kv_rows + columns, mask=is_listed(key_r, T, form)[:, None])
        async_copy.commit_group()

    @gluon.jit
    def _grad_rows(grad_kv, entries, first, offs, form: gl.constexpr, PER_ENTRY: gl.constexpr):
        """Where the gradients of a block's latents go, and which of them are listed."""
        key = gl.load(entries.keys + first + offs, mask=first + offs < entries.count, other=-1)
        slot = slot_of(key, form)
        if PER_ENTRY:
            slot = first + offs
        return grad_kv + slot.to(gl.int64) * WIDTH, is_listed(key, entries.T, form)

    @gluon.jit
    def _grad_piece(ds_sm, p_sm, q_v, do_v, c: gl.constexpr, zero, layout: gl.constexpr):
        """Start the gradient of a block's latents in the columns of piece c: dS^T q + P^T do."""
        piece = gl.zeros([N, PIECE], gl.float32, layout)
        ds_t, p_t = ds_sm.index(zero).permute((1, 0)), p_sm.index(zero).permute((1, 0))
        piece = warpgroup_mma(ds_t, q_v.index(c + zero), piece, use_acc=False, is_async=True)
        return warpgroup_mma(p_t, do_v.index(c + zero), piece, is_async=True)

    @gluon.jit
    def _add_or_store(pointers, values, mask, PER_ENTRY: gl.constexpr):
        if PER_ENTRY:
            gl.store(pointers, values, mask=mask)
        else:
            gl.atomic_add(pointers, values, mask=mask, sem="relaxed")
