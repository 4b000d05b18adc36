"""Sparse MLA backward in Triton for any GPU: probabilities are computed again from the lse of the forward pass.

One program holds `BLOCK_M` rows (heads of one query, or of `GROUP` adjacent queries) and walks one key list in blocks
of `BLOCK_N`, as the forward pass does. The gradient of its queries stays in registers; that of the latents, which
many queries share, is added in fp32 by atomics, or in the deterministic mode written out for every list entry of a
bounded chunk of queries and then summed slot by slot in the order of the entries.

With P = exp(scale q.k - lse), delta = sum_v do * out and dS = scale * P * (do.v - delta): dq = dS k,
dkv = dS^T q + P^T do (the latter on the value columns only).

Legend: as `sparse_mla_triton.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..common.device_target import DeviceTarget, device_target
from ..common.dispatch import Backend, Operation, takes_all
from ..common.kernel_constants import LARGE_SHARED_MEMORY, LOG2_E, WIDE_LATENT
from ..common.kernel_launch import launcher, rows_contiguous, tile_options
from ..common.triton_support import tl, triton
from .sparse_mla_backward_hopper_gluon import ROWS as HOPPER_ROWS
from .sparse_mla_backward_hopper_gluon import hopper_backward_supports, sparse_mla_backward_hopper
from .sparse_mla_triton import QUERIES_PER_LAUNCH, Tile, selection_group
from .sparse_mla_union_triton import (
    count_keys,
    list_constants,
    merge_key_lists,
    owner_shift,
    program_place,
    row_of,
    slot_of,
)

# fp32 contributions written out at a time in the deterministic mode.
DETERMINISTIC_SCRATCH_BYTES = 2**30


def sparse_mla_backward_tile(target: DeviceTarget, rows: int, width: int) -> Tile:
    """Default tile for `rows` of latents `width` entries wide; see `sparse_mla_tile` for the bounds."""
    backend, arch, _ = target
    if backend == "hip":
        return Tile(16, 16, 4, 1)
    if arch in LARGE_SHARED_MEMORY and rows > 16:
        return Tile(32, 32, 8, 1)
    return Tile(16, 16 if width > WIDE_LATENT else 32, 4, 1)


def sparse_mla_backward_triton(
    grad_out, grad_lse, q, kv, indices, out, lse, scale, deterministic
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `q` and `kv`, in their dtypes, of `sparse_mla` whose results were `out` and `lse`."""
    B, S, H, D = q.shape
    q, kv = rows_contiguous(q), rows_contiguous(kv)
    grad_out, indices, lse = grad_out.contiguous(), indices.contiguous(), lse.contiguous()
    grad_q = torch.empty(B, S, H, D, dtype=q.dtype, device=q.device)
    grad_kv = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
    if grad_out.numel() == 0 or indices.shape[-1] == 0 or kv.shape[1] == 0:
        return grad_q.zero_(), grad_kv.to(kv.dtype)
    # The lse's own gradient is P, so it joins the term that every score of a row shares.
    delta = _row_dots(grad_out, out) - grad_lse.masked_fill(lse == float("-inf"), 0.0)
    step = max(1, QUERIES_PER_LAUNCH // B)
    for first in range(0, S, step):
        rows = slice(first, first + step)
        parts = (grad_out[:, rows], lse[:, rows], delta[:, rows], grad_q[:, rows])
        _backward(q[:, rows], kv, indices[:, rows], *parts, grad_kv, scale, deterministic)
    return grad_q, grad_kv.to(kv.dtype)


def _backward(q, kv, indices, grad_out, lse, delta, grad_q, grad_kv, scale, deterministic: bool) -> None:
    """One launch's worth of queries."""
    group = selection_group(q.device, q.shape[2], q.shape[1], indices.shape[-1], kv.shape[1])
    keys, counts = indices, None
    if group > 1:
        keys, counts = merge_key_lists(indices, group, kv.shape[1])
    arguments = (q, kv, keys, counts, grad_out, lse, delta, grad_q, grad_kv, scale, group)
    _KERNELS(q.device, deterministic, *arguments)


def _why_not_hopper(deterministic, q, kv, keys, counts, grad_out, *_) -> str | None:
    if device_target(q.device).arch != 90:
        return "it is for compute capability 9.0"
    return None if hopper_backward_supports(q, kv, grad_out) else "the shapes or strides are not what it takes"


def _in_hopper(deterministic, *arguments) -> None:
    launch: Any = _launch_deterministic if deterministic else _launch
    launch(*arguments, tile=None)


def _in_triton(deterministic, q, *arguments) -> None:
    tile = sparse_mla_backward_tile(device_target(q.device), arguments[-1] * q.shape[2], q.shape[3])
    launch: Any = _launch_deterministic if deterministic else _launch
    launch(q, *arguments, tile=tile)


def _example(new) -> tuple:
    keys, rows = new(1, 8192, 2048, dtype=torch.int32), new(1, 8192, 20, dtype=torch.float32)
    q, kv, grad_out = new(1, 8192, 20, 576), new(1, 8192, 576), new(1, 8192, 20, 512)
    grad_q, grad_kv = new(1, 8192, 20, 576), new(1, 8192, 576, dtype=torch.float32)
    return False, q, kv, keys, None, grad_out, rows, rows, grad_q, grad_kv, 1.0, 1


_KERNELS = Operation(
    "sparse_mla's gradient: kernels",
    Backend("Gluon for Hopper", _why_not_hopper, _in_hopper, optional=True),
    Backend("Triton", takes_all, _in_triton),
    prefill=_example,
)


def _launch_deterministic(
    q, kv, keys, counts, grad_out, lse, delta, grad_q, grad_kv, scale, group: int, tile: Tile | None
) -> None:
    """Lists in chunks: a row of `grad_kv` for every entry, then each slot's rows added in the order of the entries."""
    B, lists, entries = keys.shape
    H, D = q.shape[2:]
    head_blocks = triton.cdiv(group * H, HOPPER_ROWS if tile is None else tile.block_m)
    step = min(lists, max(1, DETERMINISTIC_SCRATCH_BYTES // (head_blocks * entries * D * 4)))
    # Once: in this mode PyTorch fills what it allocates.
    buffer = torch.empty(step, head_blocks, entries, D, dtype=torch.float32, device=q.device)
    for batch in range(B):
        one = slice(batch, batch + 1)
        for first in range(0, lists, step):
            some = slice(first, min(first + step, lists))
            queries = slice(first * group, some.stop * group)
            count = None if counts is None else counts[one, some].contiguous()
            listed = keys[one, some]
            scratch = buffer[: listed.shape[1]]
            rows = (q[one, queries], kv[one], listed, count, grad_out[one, queries], lse[one, queries])
            rest = (delta[one, queries], grad_q[one, queries], grad_kv[one], scale, group, tile)
            _launch(*rows, *rest, per_entry=scratch)
            slots = listed[0]
            if group > 1:
                slots = slots & ((1 << owner_shift(group)) - 1)
            unused = listed[0] < 0
            if count is not None:
                unused = unused | (torch.arange(entries, device=q.device) >= count[0].unsqueeze(-1))
            add_rows_by_slot(scratch, torch.where(unused, -1, slots), grad_kv[batch])


def add_rows_by_slot(rows: torch.Tensor, slots: torch.Tensor, total: torch.Tensor) -> None:
    """Add rows to the slots that they belong to, each slot's in the order of the lists: the same bits every time.

    Args:
        rows: fp32 of shape `[lists, parts, entries, D]`, contiguous: `parts` addends for every entry.
        slots: int32 of shape `[lists, entries]`, -1 for entries to leave out.
        total: fp32 of shape `[T, D]`, contiguous; changed in place.
    """
    T, D = total.shape
    ordered, order = torch.where(slots < 0, T, slots).flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(T + 1, device=total.device, dtype=ordered.dtype))
    launcher(_add_segments_kernel, (T,), rows)(
        rows,
        order,
        starts,
        total,
        rows.shape[2],
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        PARTS=rows.shape[1],
        num_warps=4,
    )


def _launch(q, kv, keys, counts, grad_out, lse, delta, grad_q, grad_kv, scale, group, tile, per_entry=None) -> None:
    """Run the Hopper kernel (no tile) or the portable one; add to `grad_kv`, or write `per_entry` instead."""
    B, S, H, D = q.shape
    V = grad_out.shape[-1]
    written = grad_kv if per_entry is None else per_entry
    if tile is None:
        arguments = (q, kv, keys, counts, grad_out, lse, delta, scale, scale * LOG2_E, grad_q, written)
        sparse_mla_backward_hopper(*arguments, per_entry is not None, group)
        return
    lists, constants = triton.cdiv(S, group), list_constants(H, group, tile.block_m, keys.shape[-1])
    # A program takes fewer rows than the heads of a group.
    constants["HEAD_BLOCKS"] = triton.cdiv(group * H, tile.block_m)
    half = max(16, triton.next_power_of_2(triton.cdiv(V, 2)))
    tensors = (q, kv, keys, counts, grad_out, lse, delta, grad_q, written)
    sizes = (scale, scale * LOG2_E, S, lists, keys.shape[-1], kv.shape[1])
    strides = (
        *q.stride()[:3],
        *kv.stride()[:2],
        *keys.stride()[:2],
        *grad_out.stride()[:3],
        *lse.stride()[:2],
        *grad_q.stride()[:3],
        grad_kv.stride(0),
    )
    launcher(_sparse_mla_bwd_kernel, (B * lists * constants["HEAD_BLOCKS"],), q)(
        *tensors,
        *sizes,
        *strides,
        V=V,
        R=D - V,
        HALF_V=half,
        BLOCK_R=max(16, triton.next_power_of_2(D - V)),
        PER_ENTRY=per_entry is not None,
        **constants,
        **tile_options(tile),
    )


def _row_dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`sum_v one * other` in fp32, `[B, S, H]`, of contiguous `[B, S, H, V]` tensors."""
    dots = torch.empty(one.shape[:3], dtype=torch.float32, device=one.device)
    V = one.shape[-1]
    rows = 8
    launcher(_row_dots_kernel, (triton.cdiv(dots.numel(), rows),), one)(
        one,
        other.contiguous(),
        dots,
        dots.numel(),
        V=V,
        BLOCK_V=triton.next_power_of_2(V),
        ROWS=rows,
        num_warps=4,
    )
    return dots


if triton is not None:
    _LOG2_E = tl.constexpr(LOG2_E)

    @triton.jit
    def _row_dots_kernel(one, other, dots, rows, V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        offs_v = tl.arange(0, BLOCK_V)
        offs = row[:, None] * V + offs_v[None, :]
        mask = (row < rows)[:, None] & (offs_v < V)[None, :]
        a = tl.load(one + offs, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(other + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dots + row, tl.sum(a * b, 1), mask=row < rows)

    @triton.jit
    def _add_segments_kernel(
        rows, order, starts, total, entries, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr
    ):
        slot = tl.program_id(0).to(tl.int64)
        offs = tl.arange(0, BLOCK_D)
        mask = offs < D
        first = tl.load(starts + slot)
        last = tl.load(starts + slot + 1)
        if first == last:
            return
        acc = tl.load(total + slot * D + offs, mask=mask, other=0.0)
        for i in range(first, last):
            entry = tl.load(order + i)
            for part in tl.static_range(PARTS):
                row = (entry // entries * PARTS + part) * entries + entry % entries
                acc += tl.load(rows + row * D + offs, mask=mask, other=0.0)
        tl.store(total + slot * D + offs, acc, mask=mask)

    @triton.jit(do_not_specialize=["S", "lists", "T", "lse_stride_b"])
    def _sparse_mla_bwd_kernel(
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
        H: tl.constexpr,
        V: tl.constexpr,
        R: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        HALF_V: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP: tl.constexpr,
        OWNER_SHIFT: tl.constexpr,
        HEAD_BLOCKS: tl.constexpr,
        PER_ENTRY: tl.constexpr,
    ):
        list_id, head_block, batch = program_place(lists, HEAD_BLOCKS)
        offs_m = head_block * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        lo = tl.arange(0, HALF_V)
        hi = HALF_V + lo
        lo_mask, hi_mask = lo < V, hi < V
        offs_r = tl.arange(0, BLOCK_R)
        r_mask = offs_r < R
        query, head, member, row_mask = row_of(offs_m, list_id, S, H, GROUP)

        keys_row = keys + batch * keys_stride_b + list_id.to(tl.int64) * keys_stride_s
        if GROUP > 1:
            count = tl.load(counts + batch * lists + list_id)
        else:
            count = count_keys(keys_row, K, BLOCK_K)

        rows = row_mask[:, None]
        q_rows = (q + batch * q_stride_b + query * q_stride_s + head.to(tl.int64) * q_stride_h)[:, None]
        do_rows = (grad_out + batch * do_stride_b + query * do_stride_s + head.to(tl.int64) * do_stride_h)[:, None]
        q_lo = tl.load(q_rows + lo[None, :], mask=rows & lo_mask[None, :], other=0.0)
        q_hi = tl.load(q_rows + hi[None, :], mask=rows & hi_mask[None, :], other=0.0)
        do_lo = tl.load(do_rows + lo[None, :], mask=rows & lo_mask[None, :], other=0.0)
        do_hi = tl.load(do_rows + hi[None, :], mask=rows & hi_mask[None, :], other=0.0)
        lse_rows = batch * lse_stride_b + query * lse_stride_s + head
        # Rows that do not exist, and queries without keys, get probabilities of zero.
        row_lse = tl.load(lse + lse_rows, mask=row_mask, other=float("inf"))
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) * _LOG2_E
        row_delta = tl.load(delta + lse_rows, mask=row_mask, other=0.0)
        kv_batch = kv + batch * kv_stride_b
        if PER_ENTRY:
            grad_rows = grad_kv + (list_id.to(tl.int64) * HEAD_BLOCKS + head_block) * K * (V + R)
        else:
            grad_rows = grad_kv + batch * dkv_stride_b

        dq_lo = tl.zeros([BLOCK_M, HALF_V], tl.float32)
        dq_hi = tl.zeros([BLOCK_M, HALF_V], tl.float32)
        if R > 0:
            q_r = tl.load(q_rows + V + offs_r[None, :], mask=rows & r_mask[None, :], other=0.0)
            dq_r = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for first in range(0, count, BLOCK_N):
            offs_k = first + offs_n
            key = tl.load(keys_row + offs_k, mask=offs_k < count, other=-1)
            slot, listed = slot_of(key, T, GROUP, OWNER_SHIFT)
            kv_rows = (kv_batch + slot.to(tl.int64) * kv_stride_t)[:, None]
            c_lo = tl.load(kv_rows + lo[None, :], mask=listed[:, None] & lo_mask[None, :], other=0.0)
            c_hi = tl.load(kv_rows + hi[None, :], mask=listed[:, None] & hi_mask[None, :], other=0.0)
            s = tl.dot(q_lo, tl.trans(c_lo))  # [BM, BN]
            s = tl.dot(q_hi, tl.trans(c_hi), acc=s)
            if R > 0:
                k_r = tl.load(kv_rows + V + offs_r[None, :], mask=listed[:, None] & r_mask[None, :], other=0.0)
                s = tl.dot(q_r, tl.trans(k_r), acc=s)
            dp = tl.dot(do_lo, tl.trans(c_lo))
            dp = tl.dot(do_hi, tl.trans(c_hi), acc=dp)
            visible = listed[None, :]
            if GROUP > 1:
                visible = visible & (((key[None, :] >> (OWNER_SHIFT + member[:, None])) & 1) != 0)
            p = tl.where(visible, tl.exp2(s * scale_log2 - row_lse[:, None]), 0.0)
            ds = (p * (dp - row_delta[:, None]) * scale).to(q_lo.dtype)
            p = p.to(q_lo.dtype)
            dq_lo = tl.dot(ds, c_lo, acc=dq_lo)
            dq_hi = tl.dot(ds, c_hi, acc=dq_hi)
            p_t, ds_t = tl.trans(p), tl.trans(ds)
            if PER_ENTRY:
                out_rows = (grad_rows + offs_k.to(tl.int64) * (V + R))[:, None]
            else:
                out_rows = (grad_rows + slot.to(tl.int64) * (V + R))[:, None]
            dkv = tl.dot(ds_t, q_lo)  # [BN, HALF_V]
            dkv = tl.dot(p_t, do_lo, acc=dkv)
            _add_or_store(out_rows + lo[None, :], dkv, listed[:, None] & lo_mask[None, :], PER_ENTRY)
            dkv = tl.dot(ds_t, q_hi)
            dkv = tl.dot(p_t, do_hi, acc=dkv)
            _add_or_store(out_rows + hi[None, :], dkv, listed[:, None] & hi_mask[None, :], PER_ENTRY)
            if R > 0:
                dq_r = tl.dot(ds, k_r, acc=dq_r)
                dkv_r = tl.dot(ds_t, q_r)
                _add_or_store(out_rows + V + offs_r[None, :], dkv_r, listed[:, None] & r_mask[None, :], PER_ENTRY)

        dq_rows = (grad_q + batch * dq_stride_b + query * dq_stride_s + head * dq_stride_h)[:, None]
        tl.store(dq_rows + lo[None, :], dq_lo.to(grad_q.dtype.element_ty), mask=rows & lo_mask[None, :])
        tl.store(dq_rows + hi[None, :], dq_hi.to(grad_q.dtype.element_ty), mask=rows & hi_mask[None, :])
        if R > 0:
            tl.store(dq_rows + V + offs_r[None, :], dq_r.to(grad_q.dtype.element_ty), mask=rows & r_mask[None, :])

    @triton.jit
    def _add_or_store(pointers, values, mask, PER_ENTRY: tl.constexpr):
        if PER_ENTRY:
            tl.store(pointers, values, mask=mask)
        else:
            tl.atomic_add(pointers, values, mask=mask, sem="relaxed")
