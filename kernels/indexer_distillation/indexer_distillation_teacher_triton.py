"""The teacher of the dense warm-up in Triton: lse and head-mean probabilities of attention over all visible keys.

The probabilities of a chunk of queries are written to a bounded scratch `[chunk, T]`, heads and served layers added up
on the chip; the index kernels of `indexer_distillation_dense_triton.py` read them from there.

Legend: B batch, S queries, T keys, H heads, D latent width = MAIN (a power of two) + REST; BQ queries and BN keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..common.device_target import DeviceTarget, device_target
from ..common.kernel_constants import ASYNCHRONOUS_PRODUCTS, LN_2, LOG2_E, WIDE_LATENT
from ..common.kernel_launch import launcher, rows_contiguous, tile_options
from ..common.triton_support import tl, triton
from .indexer_distillation_triton import latent_blocks

# Teacher probabilities of a chunk of queries, fp32.
TARGET_SCRATCH_BYTES = 256 * 2**20


class DenseTile(NamedTuple):
    """Launch shape of a kernel over tiles of queries and keys."""

    block_q: int
    block_n: int
    num_warps: int
    num_stages: int


class Visibility(NamedTuple):
    """What queries see: `[B]` slot of the first query, `[B, S]` first visible slot or None, `[B, T]` mask or None."""

    query_start: torch.Tensor
    key_start: torch.Tensor | None
    key_mask: torch.Tensor | None

    def for_kernels(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The same as the kernels take it: contiguous, a slot as int64, a mask as bytes."""
        key_start = None if self.key_start is None else self.key_start.contiguous()
        key_mask = None if self.key_mask is None else self.key_mask.contiguous().view(torch.uint8)
        return self.query_start.to(torch.int64).contiguous(), key_start, key_mask


def latent_tile(target: DeviceTarget, width: int) -> DenseTile:
    """Default tile of the attention's lse and probabilities, for latents `width` entries wide."""
    backend, arch, _ = target
    if width <= WIDE_LATENT:
        return DenseTile(64, 32, 4, 1) if backend == "hip" else DenseTile(64, 64, 4, 1)
    if backend == "hip":
        return DenseTile(32, 16, 4, 1)
    if arch in ASYNCHRONOUS_PRODUCTS:
        return DenseTile(64, 64, 8, 2)
    return DenseTile(64, 32, 4, 1) if arch == 80 else DenseTile(32, 32, 4, 1)


def attention_lse_triton(
    q: torch.Tensor,
    kv: torch.Tensor,
    scale: float,
    query_start: torch.Tensor,
    key_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments and result as `attention_lse`; bf16 or fp16."""
    B, S, H, D = q.shape
    q, kv = rows_contiguous(q), rows_contiguous(kv)
    lse = torch.full((B, S, H), float("-inf"), dtype=torch.float32, device=q.device)
    if lse.numel() == 0 or kv.shape[1] == 0:
        return lse
    tile = latent_tile(device_target(q.device), D)
    tensors = (q, kv, lse, *Visibility(query_start, key_start, key_mask).for_kernels())
    sizes = (scale * LOG2_E, S, kv.shape[1], *q.stride()[:3], *kv.stride()[:2])
    launcher(_attention_lse_kernel, (triton.cdiv(S, tile.block_q) * H, B), q)(
        *tensors, *sizes, **latent_blocks(H, D), **tile_options(tile)
    )
    return lse


def teacher_targets(
    q_attn: Sequence[torch.Tensor],
    kv: Sequence[torch.Tensor],
    attn_lse: Sequence[torch.Tensor],
    attn_scale: float,
    visible: Visibility,
    queries: int,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Chunks of queries with the teacher's probabilities `[B, chunk, T]`, in one buffer that is written again."""
    B, T = kv[0].shape[:2]
    step = max(16, TARGET_SCRATCH_BYTES // (B * T * 4))
    buffer = torch.empty(B, min(step, queries), T, dtype=torch.float32, device=kv[0].device)
    layers = [
        (rows_contiguous(x), rows_contiguous(y), z.float().contiguous()) for x, y, z in zip(q_attn, kv, attn_lse)
    ]
    for first in range(0, queries, step):
        last = min(first + step, queries)
        for number, (one_q, one_kv, one_lse) in enumerate(layers):
            H, D = one_q.shape[2:]
            tile = latent_tile(device_target(one_q.device), D)
            tensors = (one_q, one_kv, one_lse, buffer, *visible.for_kernels())
            sizes = (attn_scale * LOG2_E, 1.0 / (H * len(layers)), first, last, queries, T)
            strides = (*one_q.stride()[:3], *one_kv.stride()[:2], buffer.stride(0))
            grid = (triton.cdiv(T, tile.block_n) * triton.cdiv(last - first, tile.block_q), B)
            launcher(_head_mean_kernel, grid, one_q)(
                *tensors, *sizes, *strides, ADD=number > 0, **latent_blocks(H, D), **tile_options(tile)
            )
        yield first, last, buffer


if triton is not None:
    _LOG2_E, _LN_2 = tl.constexpr(LOG2_E), tl.constexpr(LN_2)

    @triton.jit
    def last_and_first_slot(query_start, key_start, batch, query, real, S):
        """Last and first slot that each query sees; queries that do not exist see nothing."""
        last = tl.where(real, tl.load(query_start + batch) + query, -1)
        first = tl.zeros_like(last)
        if key_start is not None:
            first = tl.load(key_start + batch * S + query, mask=real, other=0).to(tl.int64)
        return last, first

    @triton.jit
    def slots_of_queries(query_start, key_start, batch, query, real, S, T, BLOCK_N: tl.constexpr):
        """Last and first slot of each query, and the keys that they see between them: from a block's first on."""
        last_slot, first_slot = last_and_first_slot(query_start, key_start, batch, query, real, S)
        end = tl.minimum(tl.max(last_slot, 0) + 1, T)
        begin = tl.min(tl.where(real, first_slot, T), 0) // BLOCK_N * BLOCK_N
        return last_slot, first_slot, begin, end

    @triton.jit
    def seen_keys(key, key_mask, batch, T):
        """Which keys exist and are not masked."""
        seen = key < T
        if key_mask is not None:
            seen = seen & (tl.load(key_mask + batch * T + key, mask=seen, other=0) != 0)
        return seen

    @triton.jit
    def _attention_lse_kernel(
        q,
        kv,
        lse,
        query_start,
        key_start,
        key_mask,
        scale_log2,
        S,
        T,
        q_stride_b,
        q_stride_s,
        q_stride_h,
        kv_stride_b,
        kv_stride_t,
        H: tl.constexpr,
        MAIN: tl.constexpr,
        REST: tl.constexpr,
        BLOCK_REST: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        # Heads of the same queries are neighbours and read the same keys; the longest rows start first.
        batch = tl.program_id(1).to(tl.int64)
        block = tl.num_programs(0) // H - 1 - tl.program_id(0) // H
        head = (tl.program_id(0) % H).to(tl.int64)
        query = (block * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
        real = query < S
        offs_d = tl.arange(0, MAIN)
        offs_r = tl.arange(0, BLOCK_REST)
        q_rows = (q + batch * q_stride_b + query * q_stride_s + head * q_stride_h)[:, None]
        q_main = tl.load(q_rows + offs_d[None, :], mask=real[:, None], other=0.0)
        if REST > 0:
            r_mask = (offs_r < REST)[None, :]
            q_rest = tl.load(q_rows + MAIN + offs_r[None, :], mask=real[:, None] & r_mask, other=0.0)
        last_slot, first_slot, begin, end = slots_of_queries(query_start, key_start, batch, query, real, S, T, BLOCK_N)

        top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        for first in range(begin, end, BLOCK_N):
            key = first + tl.arange(0, BLOCK_N)
            exists = seen_keys(key, key_mask, batch, T)
            kv_rows = (kv + batch * kv_stride_b + key.to(tl.int64) * kv_stride_t)[:, None]
            main = tl.load(kv_rows + offs_d[None, :], mask=exists[:, None], other=0.0)
            s = tl.dot(q_main, tl.trans(main))  # [BQ, BN]
            if REST > 0:
                rest = tl.load(kv_rows + MAIN + offs_r[None, :], mask=exists[:, None] & r_mask, other=0.0)
                s = tl.dot(q_rest, tl.trans(rest), acc=s)
            visible = exists[None, :] & (key[None, :] <= last_slot[:, None]) & (key[None, :] >= first_slot[:, None])
            s = tl.where(visible, s * scale_log2, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            reference = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp2(top - reference) + tl.sum(tl.exp2(s - reference[:, None]), 1)
            top = new_top
        result = tl.where(total > 0, (top + tl.log2(total)) * _LN_2, float("-inf"))
        tl.store(lse + (batch * S + query) * H + head, result, mask=real)

    @triton.jit
    def _head_mean_kernel(
        q,
        kv,
        lse,
        target,
        query_start,
        key_start,
        key_mask,
        scale_log2,
        factor,
        first_query,
        last_query,
        S,
        T,
        q_stride_b,
        q_stride_s,
        q_stride_h,
        kv_stride_b,
        kv_stride_t,
        target_stride_b,
        H: tl.constexpr,
        ADD: tl.constexpr,
        MAIN: tl.constexpr,
        REST: tl.constexpr,
        BLOCK_REST: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        batch = tl.program_id(1).to(tl.int64)
        q_blocks = tl.cdiv(last_query - first_query, BLOCK_Q)
        query = (first_query + tl.program_id(0) % q_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
        key = tl.program_id(0) // q_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        real = query < last_query
        last_slot, first_slot = last_and_first_slot(query_start, key_start, batch, query, real, S)
        # A tile that no query sees is not read either.
        lowest_key = tl.program_id(0) // q_blocks * BLOCK_N
        if tl.max(last_slot, 0) < lowest_key:
            return
        if tl.min(tl.where(real, first_slot, T), 0) >= lowest_key + BLOCK_N:
            return
        offs_d = tl.arange(0, MAIN)
        offs_r = tl.arange(0, BLOCK_REST)
        r_mask = (offs_r < REST)[None, :]
        exists = seen_keys(key, key_mask, batch, T)
        kv_rows = (kv + batch * kv_stride_b + key.to(tl.int64) * kv_stride_t)[:, None]
        main = tl.load(kv_rows + offs_d[None, :], mask=exists[:, None], other=0.0)
        if REST > 0:
            rest = tl.load(kv_rows + MAIN + offs_r[None, :], mask=exists[:, None] & r_mask, other=0.0)
        p = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
        q_rows = (q + batch * q_stride_b + query * q_stride_s)[:, None]
        to_head = batch * 0  # in 64 bits: head-major queries lie far apart
        for head in range(H):
            q_head = q_rows + to_head
            to_head += q_stride_h
            q_main = tl.load(q_head + offs_d[None, :], mask=real[:, None], other=0.0)
            s = tl.dot(main, tl.trans(q_main))  # [BN, BQ]
            if REST > 0:
                if BLOCK_REST == REST:
                    q_rest = tl.load(q_head + MAIN + offs_r[None, :], mask=real[:, None], other=0.0)
                else:
                    q_rest = tl.load(q_head + MAIN + offs_r[None, :], mask=real[:, None] & r_mask, other=0.0)
                s = tl.dot(rest, tl.trans(q_rest), acc=s)
            row_lse = tl.load(lse + (batch * S + query) * H + head, mask=real, other=float("inf"))
            row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) * _LOG2_E
            p += tl.exp2(s * scale_log2 - row_lse[None, :])
        visible = exists[:, None] & (key[:, None] <= last_slot[None, :]) & (key[:, None] >= first_slot[None, :])
        p = tl.where(visible, p * factor, 0.0)
        p_ptr = target + batch * target_stride_b + (query - first_query)[None, :] * T + key[:, None]
        written = real[None, :] & (key < T)[:, None]
        if ADD:
            p += tl.load(p_ptr, mask=written, other=0.0)
        tl.store(p_ptr, p, mask=written)
