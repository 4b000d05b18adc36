"""Sparse MLA forward in Triton for any GPU: prefill over grouped queries, and decode split over the selected keys.

One program holds `BLOCK_M` rows (heads of one query, or of `GROUP` adjacent queries) and walks one key list in
blocks of `BLOCK_N`. A row's keys are the raw selection when `GROUP == 1`, or a merged list whose entries carry one
ownership bit a query (`sparse_mla_union_triton.py`).

Legend: B batch, S queries, T keys, H heads, D latent width with RoPE, V value width, R = D - V, K selected keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.device_target import DeviceTarget, device_target
from ..common.dispatch import Backend, Operation, takes_all
from ..common.early_launch import early_launch, wait_for_kernels_ahead
from ..common.kernel_constants import LARGE_SHARED_MEMORY, LN_2, LOG2_E, WIDE_LATENT
from ..common.kernel_launch import launcher, rows_contiguous, tile_options
from ..common.triton_support import tl, triton
from .sparse_mla_hopper_gluon import ROWS as HOPPER_ROWS
from .sparse_mla_hopper_gluon import hopper_supports, sparse_mla_hopper
from .sparse_mla_union_triton import (
    count_keys,
    group_size,
    list_constants,
    merge_key_lists,
    program_place,
    row_of,
    slot_of,
)

# Queries of one launch, about: bounds the merged lists and their scratch memory (10 bytes a selected key).
QUERIES_PER_LAUNCH = 4096
# Parts that the keys of a decoding query are split into at most, and entries that a program adds up of them.
MOST_SPLITS, COMBINED_ENTRIES = 64, 64
# Lists of fewer keys are counted in blocks of as many: a variant for each length of a short context is not worth it.
LEAST_BLOCK_K = 2048

# Compute capabilities whose shared memory holds 64 rows and whose matrix unit takes them from there or from registers.
GROUPING_ARCHITECTURES = (80, 90)


class Tile(NamedTuple):
    """Launch shape of `_sparse_mla_fwd_kernel`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def sparse_mla_tile(target: DeviceTarget, rows: int, width: int) -> Tile:
    """Default tile for `rows` (heads, or heads of a group of queries) of latents `width` entries wide.

    Bounded by shared memory: the queries and `num_stages` blocks of latents of `2 * width` bytes a row must fit
    99 KB (sm86, sm89, sm120), 163 KB (sm80) or 227 KB (sm90, sm100); gfx942 has 64 KB.
    """
    wide = width > WIDE_LATENT
    backend, arch, _ = target
    if backend == "hip":
        return Tile(16, 16 if wide else 32, 4, 1)
    if rows <= 16 or arch not in LARGE_SHARED_MEMORY:
        return Tile(16, 32, 4, 3)
    if rows > 32 and arch in GROUPING_ARCHITECTURES:
        return Tile(64, 32, 8, 3)
    return Tile(32, 64, 8, 2)


def sparse_mla_triton(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as `kernels.sparse_mla.sparse_mla`; bf16 or fp16, no gradient."""
    B, S, H, _ = q.shape
    q, kv, indices = rows_contiguous(q), rows_contiguous(kv), indices.contiguous()
    out = q.new_empty(B, S, H, value_dim)
    lse = torch.empty(B, S, H, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if indices.shape[-1] == 0 or kv.shape[1] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    target = device_target(q.device)
    tile = sparse_mla_tile(target, 1, q.shape[-1])
    splits = _decode_splits(B * S * triton.cdiv(H, tile.block_m), indices.shape[-1], tile.block_n, target.processors)
    if splits > 1:
        return _decode(q, kv, indices, scale, out, lse, splits, tile)
    group = selection_group(q.device, H, S, indices.shape[-1], kv.shape[1])
    step = max(1, _queries_per_launch(q.device, H, group) // B)
    for first in range(0, S, step):
        rows = slice(first, first + step)
        keys, counts = indices[:, rows], None
        if group > 1:
            keys, counts = merge_key_lists(keys, group, kv.shape[1])
        _PREFILL(q.device, q[:, rows], kv, keys, counts, group, scale, out[:, rows], lse[:, rows])
    return out, lse


def sparse_mla_merged(q, kv, keys, counts, group, scale, value_dim) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sparse_mla_triton`, from lists that `merge_key_lists` made of every `group` queries."""
    B, S, H, _ = q.shape
    out = q.new_empty(B, S, H, value_dim)
    lse = torch.empty(B, S, H, dtype=torch.float32, device=q.device)
    if out.numel():
        _PREFILL(q.device, q, kv, keys, counts.contiguous(), group, scale, out, lse)
    return out, lse


def selection_group(device: torch.device, heads: int, queries: int, topk: int, slots: int) -> int:
    """Adjacent queries whose lists a prefill merges; 1: none."""
    backend, arch, _ = device_target(device)
    if backend != "cuda" or arch not in GROUPING_ARCHITECTURES:
        return 1
    return group_size(heads, HOPPER_ROWS, queries, topk, slots)


def queries_per_wave(device: torch.device, heads: int, group: int) -> int:
    """Queries for which every multiprocessor runs one program of 64 rows."""
    return max(1, device_target(device).processors * group // triton.cdiv(group * heads, HOPPER_ROWS))


def _queries_per_launch(device: torch.device, heads: int, group: int) -> int:
    """About `QUERIES_PER_LAUNCH`, in whole waves."""
    wave = queries_per_wave(device, heads, group)
    return triton.cdiv(QUERIES_PER_LAUNCH, wave) * wave


def _why_not_hopper(q, kv, keys, counts, group, scale, out, lse) -> str | None:
    if device_target(q.device).arch != 90:
        return "it is for compute capability 9.0"
    return None if hopper_supports(q, kv, out.shape[-1]) else "the shapes or strides are not what it takes"


def _prefill_in_hopper(q, kv, keys, counts, group, scale, out, lse) -> None:
    sparse_mla_hopper(q, kv, keys, counts, scale * LOG2_E, out, lse, group)


def _prefill_in_triton(q, kv, keys, counts, group, scale, out, lse) -> None:
    tile = sparse_mla_tile(device_target(q.device), group * q.shape[2], q.shape[3])
    _launch(q, kv, keys, counts, scale, out, lse, tile, group, splits=1)


def _example(new) -> tuple:
    out, lse = new(1, 8192, 20, 512), new(1, 8192, 20, dtype=torch.float32)
    return new(1, 8192, 20, 576), new(1, 8192, 576), new(1, 8192, 2048, dtype=torch.int32), None, 1, 1.0, out, lse


_PREFILL = Operation(
    "sparse_mla: prefill kernels",
    Backend("Gluon for Hopper", _why_not_hopper, _prefill_in_hopper, optional=True),
    Backend("Triton", takes_all, _prefill_in_triton),
    prefill=_example,
)


def _decode(q, kv, indices, scale, out, lse, splits, tile) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, H, V = out.shape
    part_out = torch.empty(splits, B, S, H, V, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(splits, B, S, H, dtype=torch.float32, device=q.device)
    _launch(q, kv, indices, None, scale, part_out, part_lse, tile, 1, splits)
    block_v = min(COMBINED_ENTRIES, triton.next_power_of_2(V))
    tensors = (part_out, part_lse, out, lse)
    launcher(_sparse_mla_combine_kernel, (B * S * H, triton.cdiv(V, block_v)), part_out)(
        *tensors, B * S * H, splits, V=V, BLOCK_V=block_v, BLOCK_SPLITS=MOST_SPLITS, num_warps=4, **early_launch()
    )
    return out, lse


def _launch(q, kv, keys, counts, scale, out, lse, tile: Tile, group: int, splits: int) -> None:
    B, S, H, D = q.shape
    V = out.shape[-1]
    lists, constants = triton.cdiv(S, group), list_constants(H, group, tile.block_m, keys.shape[-1])
    constants["BLOCK_K"] = max(LEAST_BLOCK_K, constants["BLOCK_K"])
    split_stride, split_lse_stride = (out.stride(0), lse.stride(0)) if splits > 1 else (0, 0)
    tensors = (q, kv, keys, counts, out, lse)
    sizes = (scale * LOG2_E, S, lists, keys.shape[-1], kv.shape[1])
    strides = (
        *q.stride()[:3],
        *kv.stride()[:2],
        *keys.stride()[:2],
        split_stride,
        *out.stride()[-4:-1],
        split_lse_stride,
        *lse.stride()[-3:-1],
    )
    launcher(_sparse_mla_fwd_kernel, (B * lists * constants["HEAD_BLOCKS"], splits), q)(
        *tensors,
        *sizes,
        *strides,
        V=V,
        R=D - V,
        BLOCK_V=max(16, triton.next_power_of_2(V)),
        BLOCK_R=max(16, triton.next_power_of_2(D - V)),
        SPLIT=splits > 1,
        **constants,
        **tile_options(tile),
        **early_launch(),
    )


def _decode_splits(programs: int, topk: int, block_n: int, processors: int) -> int:
    """Splits that occupy every multiprocessor; 1 (no decode) where three quarters of them have a program anyway."""
    if 4 * programs > 3 * processors:
        return 1
    return min(MOST_SPLITS, triton.cdiv(topk, block_n), triton.cdiv(processors, programs))


if triton is not None:
    _LN_2 = tl.constexpr(LN_2)

    @triton.jit(do_not_specialize=["S", "lists", "T", "lse_stride_split", "lse_stride_b"])
    def _sparse_mla_fwd_kernel(
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
        out_stride_split,
        out_stride_b,
        out_stride_s,
        out_stride_h,
        lse_stride_split,
        lse_stride_b,
        lse_stride_s,
        H: tl.constexpr,
        V: tl.constexpr,
        R: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_V: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP: tl.constexpr,
        OWNER_SHIFT: tl.constexpr,
        HEAD_BLOCKS: tl.constexpr,
        SPLIT: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        wait_for_kernels_ahead(EARLY)
        # Head blocks of one query are neighbours: the second gather finds the latents in L2.
        list_id, head_block, batch = program_place(lists, HEAD_BLOCKS)
        offs_m = head_block * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        offs_v = tl.arange(0, BLOCK_V)
        offs_r = tl.arange(0, BLOCK_R)
        query, head, member, row_mask = row_of(offs_m, list_id, S, H, GROUP)

        keys_row = keys + batch * keys_stride_b + list_id.to(tl.int64) * keys_stride_s
        if GROUP > 1:
            count = tl.load(counts + batch * lists + list_id)
        else:
            count = count_keys(keys_row, K, BLOCK_K)
        blocks = tl.cdiv(count, BLOCK_N)
        first = 0
        if SPLIT:
            blocks_per_split = tl.cdiv(blocks, tl.num_programs(1))
            first = tl.program_id(1) * blocks_per_split
            blocks = tl.minimum(first + blocks_per_split, blocks)

        q_rows = q + batch * q_stride_b + query * q_stride_s + head.to(tl.int64) * q_stride_h
        v_mask = offs_v < V
        q_v = tl.load(q_rows[:, None] + offs_v[None, :], mask=row_mask[:, None] & v_mask[None, :], other=0.0)
        if R > 0:
            r_mask = offs_r < R
            q_r = tl.load(q_rows[:, None] + V + offs_r[None, :], mask=row_mask[:, None] & r_mask[None, :], other=0.0)
        kv_batch = kv + batch * kv_stride_b

        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        # The keys of block i + 1 are loaded in iteration i, so that the gather's address is ready a block ahead
        # and the pipeliner can issue it.
        offs_k = first * BLOCK_N + offs_n
        next_key = tl.load(keys_row + offs_k, mask=offs_k < count, other=-1)
        for block in range(first, blocks):
            key = next_key
            offs_k = (block + 1) * BLOCK_N + offs_n
            next_key = tl.load(keys_row + offs_k, mask=offs_k < count, other=-1)
            slot, listed = slot_of(key, T, GROUP, OWNER_SHIFT)
            kv_rows = kv_batch + slot.to(tl.int64) * kv_stride_t
            if BLOCK_V == V:
                c = tl.load(kv_rows[:, None] + offs_v[None, :], mask=listed[:, None], other=0.0)  # [BN, BV]
            else:
                c = tl.load(kv_rows[:, None] + offs_v[None, :], mask=listed[:, None] & v_mask[None, :], other=0.0)
            s = tl.dot(q_v, tl.trans(c))  # [BM, BN]
            if R > 0:
                if BLOCK_R == R:
                    k_r = tl.load(kv_rows[:, None] + V + offs_r[None, :], mask=listed[:, None], other=0.0)
                else:
                    r_ptr = kv_rows[:, None] + V + offs_r[None, :]
                    k_r = tl.load(r_ptr, mask=listed[:, None] & r_mask[None, :], other=0.0)
                s = tl.dot(q_r, tl.trans(k_r), acc=s)
            if GROUP > 1:
                owned = ((key[None, :] >> (OWNER_SHIFT + member[:, None])) & 1) != 0
                s = tl.where(owned & listed[None, :], s * scale_log2, float("-inf"))
            else:
                s = tl.where(listed[None, :], s * scale_log2, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            reference = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(s - reference[:, None])
            alpha = tl.exp2(row_max - reference)
            row_sum = row_sum * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(c.dtype), c, acc=acc * alpha[:, None])
            row_max = new_max

        acc = acc * tl.where(row_sum > 0, 1.0 / row_sum, 0.0)[:, None]
        row_lse = tl.where(row_sum > 0, (row_max + tl.log2(row_sum)) * _LN_2, float("-inf"))
        split = tl.program_id(1).to(tl.int64)
        out_rows = out + split * out_stride_split + batch * out_stride_b + query * out_stride_s + head * out_stride_h
        out_ptr = out_rows[:, None] + offs_v[None, :]
        tl.store(out_ptr, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & v_mask[None, :])
        lse_rows = lse + split * lse_stride_split + batch * lse_stride_b + query * lse_stride_s + head
        tl.store(lse_rows, row_lse, mask=row_mask)

    @triton.jit(do_not_specialize=["rows", "splits"])
    def _sparse_mla_combine_kernel(
        part_out,
        part_lse,
        out,
        lse,
        rows,
        splits,
        V: tl.constexpr,
        BLOCK_V: tl.constexpr,
        BLOCK_SPLITS: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        wait_for_kernels_ahead(EARLY)
        row = tl.program_id(0).to(tl.int64)
        offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        offs_s = tl.arange(0, BLOCK_SPLITS)
        lse_ptr = part_lse + offs_s.to(tl.int64) * rows + row
        lses = tl.load(lse_ptr, mask=offs_s < splits, other=float("-inf"))  # [SPLITS]
        top = tl.max(lses, 0)
        reference = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp(lses - reference)
        total = tl.sum(weight, 0)
        parts = part_out + (offs_s.to(tl.int64) * rows + row)[:, None] * V + offs_v[None, :]
        part = tl.load(parts, mask=(offs_s < splits)[:, None] & (offs_v < V)[None, :], other=0.0)
        acc = tl.sum(weight[:, None] * part, 0)
        acc = acc * tl.where(total > 0, 1.0 / total, 0.0)
        tl.store(out + row * V + offs_v, acc.to(out.dtype.element_ty), mask=offs_v < V)
        tl.store(lse + row, tl.where(total > 0, reference + tl.log(total), float("-inf")), mask=tl.program_id(1) == 0)
