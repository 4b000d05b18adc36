"""The dense warm-up loss in Triton: the KL of the indexer to the attention over all visible keys, in tiles.

Queries are taken in chunks, for which the teacher's probabilities are in a bounded scratch. Forward reads them against
the index scores. Backward makes them again, and holds queries for their gradient and keys for theirs, so that nothing
is added by atomics: every run gives the same bits.

Legend: B batch, S queries, T keys, H heads, D width; BQ queries and BN keys of a tile.
"""

from __future__ import annotations

import torch

from ..common.device_target import DeviceTarget, device_target
from ..common.kernel_constants import ASYNCHRONOUS_PRODUCTS
from ..common.kernel_launch import launcher, tile_options
from ..common.triton_support import tl, triton
from .indexer_distillation_teacher_triton import DenseTile, Visibility, teacher_targets
from .indexer_distillation_triton import GRADIENT_SCALE, index_blocks


def index_tile(target: DeviceTarget, heads: int) -> DenseTile:
    """Default tile of the index kernels; `block_q` times heads is one side of their products."""
    backend, arch, _ = target
    block_h = max(16, triton.next_power_of_2(heads))
    if backend == "hip":
        return DenseTile(max(1, 32 // block_h), 32, 4, 1)
    return DenseTile(max(1, 64 // block_h), 64, 4, 2 if arch in ASYNCHRONOUS_PRODUCTS else 1)


def dense_kl_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    q_attn: list[torch.Tensor],
    kv: list[torch.Tensor],
    attn_lse: list[torch.Tensor],
    scale: float,
    attn_scale: float,
    query_start: torch.Tensor,
    key_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL `[B, S]` and the lse of the index scores that its gradient needs, both fp32."""
    B, S, H, D = q.shape
    q, k, weights = q.contiguous(), k.contiguous(), weights.contiguous()
    kl = torch.zeros(B, S, dtype=torch.float32, device=q.device)
    lse = torch.zeros_like(kl)
    if B * S * H * k.shape[1] == 0:
        return kl, lse
    tile, visible = index_tile(device_target(q.device), H), Visibility(query_start, key_start, key_mask)
    constants = index_blocks(H, D) | tile_options(tile)
    for first, last, target in teacher_targets(q_attn, kv, attn_lse, attn_scale, visible, S):
        tensors = (q, k, weights, target, kl, lse, *visible.for_kernels())
        sizes = (scale, first, last, S, k.shape[1], target.stride(0))
        launcher(_dense_kl_forward_kernel, (triton.cdiv(last - first, tile.block_q), B), q)(
            *tensors, *sizes, **constants
        )
    return kl, lse


def dense_kl_backward_triton(
    grad, q, k, weights, q_attn, kv, attn_lse, lse, scale, attn_scale, *visible
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and weights, in their dtypes."""
    B, S, H, D = q.shape
    T = k.shape[1]
    q, k, weights, grad = q.contiguous(), k.contiguous(), weights.contiguous(), grad.float().contiguous()
    grad_q, grad_weights = torch.zeros_like(q), torch.zeros_like(weights)
    grad_k = torch.zeros(B, T, D, dtype=torch.float32, device=k.device)
    if B * S * H * T == 0:
        return grad_q, grad_k.to(k.dtype), grad_weights
    # Upstream gradients enter 16-bit operands relative to the largest.
    largest = grad.abs().amax().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
    tile, visible = index_tile(device_target(q.device), H), Visibility(*visible)
    constants = index_blocks(H, D) | tile_options(tile) | {"GRADIENT_SCALE": GRADIENT_SCALE}
    seen = visible.for_kernels()
    for first, last, target in teacher_targets(q_attn, kv, attn_lse, attn_scale, visible, S):
        inputs, sizes = (q, k, weights, target, lse), (scale, first, last, S, T, target.stride(0))
        launcher(_dense_kl_grad_q_kernel, (triton.cdiv(last - first, tile.block_q), B), grad)(
            grad, *inputs, grad_q, grad_weights, *seen, *sizes, **constants
        )
        launcher(_dense_kl_grad_k_kernel, (triton.cdiv(T, tile.block_n), B), grad)(
            grad, largest, *inputs, grad_k, *seen, *sizes, **constants
        )
    return grad_q, grad_k.to(k.dtype), grad_weights


if triton is not None:
    from .indexer_distillation_teacher_triton import last_and_first_slot, seen_keys, slots_of_queries

    @triton.jit
    def _index_rows(
        q,
        weights,
        scale,
        batch,
        query,
        last_query,
        S,
        H: tl.constexpr,
        D: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """Index queries `[BQ * BH, BD]` and weights times scale `[BQ * BH]`, zero where there is no such head.

        Of some queries; with the rows of both, and which of them there are.
        """
        BLOCK_Q: tl.constexpr = query.shape[0]
        offs_h = tl.arange(0, BLOCK_H)
        row = (batch * S + query)[:, None] * H + offs_h[None, :]
        mask = (query < last_query)[:, None] & (offs_h < H)[None, :]
        row = tl.reshape(row, [BLOCK_Q * BLOCK_H])
        mask = tl.reshape(mask, [BLOCK_Q * BLOCK_H])
        offs_d = tl.arange(0, BLOCK_D)
        tile = tl.load(q + row[:, None] * D + offs_d[None, :], mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)
        weight = tl.load(weights + row, mask=mask, other=0.0).to(tl.float32) * scale
        return tile, weight, row, mask

    @triton.jit
    def _tile_scores(dots, weight, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr):
        """Index scores `[BN, BQ]` from dot products `[BN, BQ * BH]`."""
        weighted = tl.maximum(dots, 0.0) * weight[None, :]
        return tl.sum(tl.reshape(weighted, [BLOCK_N, BLOCK_Q, BLOCK_H]), 2)

    @triton.jit
    def _keys(k, batch, key, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
        offs_d = tl.arange(0, BLOCK_D)
        k_ptr = k + (batch * T + key)[:, None] * D + offs_d[None, :]
        return tl.load(k_ptr, mask=(key < T)[:, None] & (offs_d < D)[None, :], other=0.0)

    @triton.jit
    def _dense_kl_forward_kernel(
        q,
        k,
        weights,
        target,
        kl,
        lse,
        query_start,
        key_start,
        key_mask,
        scale,
        first_query,
        last_query,
        S,
        T,
        target_stride_b,
        H: tl.constexpr,
        D: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        batch = tl.program_id(1).to(tl.int64)
        block = tl.num_programs(0) - 1 - tl.program_id(0)
        query = (first_query + block * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
        real = query < last_query
        q_tile, weight, _, _ = _index_rows(q, weights, scale, batch, query, last_query, S, H, D, BLOCK_H, BLOCK_D)
        last_slot, first_slot, begin, end = slots_of_queries(query_start, key_start, batch, query, real, S, T, BLOCK_N)

        # Kept by lane of the tile and reduced over keys once, at the end.
        top = tl.full([BLOCK_N, BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
        cross = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
        mass = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
        for first in range(begin, end, BLOCK_N):
            key = first + tl.arange(0, BLOCK_N)
            exists = seen_keys(key, key_mask, batch, T)
            dots = tl.dot(_keys(k, batch, key, T, D, BLOCK_D), tl.trans(q_tile))
            score = _tile_scores(dots, weight, BLOCK_N, BLOCK_Q, BLOCK_H)
            visible = exists[:, None] & (key[:, None] <= last_slot[None, :]) & (key[:, None] >= first_slot[None, :])
            p_ptr = target + batch * target_stride_b + (query - first_query)[None, :] * T + key[:, None]
            p = tl.load(p_ptr, mask=visible, other=0.0)
            cross += tl.where(p > 0, p * (tl.log(p) - score), 0.0)
            mass += p
            score = tl.where(visible, score, float("-inf"))
            new_top = tl.maximum(top, score)
            reference = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - reference) + tl.exp(score - reference)
            top = new_top
        row_top = tl.max(top, 0)
        reference = tl.where(row_top == float("-inf"), 0.0, row_top)
        row_total = tl.sum(total * tl.exp(top - reference[None, :]), 0)
        row_mass = tl.sum(mass, 0)
        usable = (row_total > 0) & (row_mass > 0)
        row_mass = tl.where(usable, row_mass, 1.0)
        row_lse = tl.where(usable, reference + tl.log(tl.where(usable, row_total, 1.0)), 0.0)
        # The mass is 1 but for rounding, of 16-bit products and of a given lse: divided out like everywhere else.
        row_kl = tl.sum(cross, 0) / row_mass - tl.log(row_mass) + row_lse
        tl.store(kl + batch * S + query, tl.where(usable, row_kl, 0.0), mask=real)
        # Probabilities of the indexer are exp(score - lse); an infinite lse marks a row without a gradient.
        tl.store(lse + batch * S + query, tl.where(usable, row_lse, float("inf")), mask=real)

    @triton.jit
    def _score_gradient(score, target, lse, rows, key, exists, S, T, target_stride_b):
        """`softmax(score) - target` `[BN, BQ]`, zero where a query does not see a key or has no gradient."""
        batch, query, first_query, last_query, last_slot, first_slot = rows
        visible = exists[:, None] & (key[:, None] <= last_slot[None, :]) & (key[:, None] >= first_slot[None, :])
        row_lse = tl.load(lse + batch * S + query, mask=query < last_query, other=float("inf"))
        visible = visible & (row_lse < float("inf"))[None, :]
        p_ptr = target + batch * target_stride_b + (query - first_query)[None, :] * T + key[:, None]
        p = tl.load(p_ptr, mask=visible, other=0.0)
        return tl.where(visible, tl.exp(score - row_lse[None, :]) - p, 0.0)

    @triton.jit
    def _active(
        dots, d_score, dtype: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr
    ):
        """`d_score` of a query at each of its heads whose dot product passes the ReLU, `[BN, BQ * BH]`."""
        spread = tl.broadcast_to(d_score[:, :, None], [BLOCK_N, BLOCK_Q, BLOCK_H])
        return tl.where(dots > 0, tl.reshape(spread, [BLOCK_N, BLOCK_Q * BLOCK_H]), 0.0).to(dtype)

    @triton.jit
    def _dense_kl_grad_q_kernel(
        grad,
        q,
        k,
        weights,
        target,
        lse,
        grad_q,
        grad_weights,
        query_start,
        key_start,
        key_mask,
        scale,
        first_query,
        last_query,
        S,
        T,
        target_stride_b,
        H: tl.constexpr,
        D: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_N: tl.constexpr,
        GRADIENT_SCALE: tl.constexpr,
    ):
        batch = tl.program_id(1).to(tl.int64)
        block = tl.num_programs(0) - 1 - tl.program_id(0)
        query = (first_query + block * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
        real = query < last_query
        q_tile, weight, row, mask = _index_rows(q, weights, scale, batch, query, last_query, S, H, D, BLOCK_H, BLOCK_D)
        last_slot, first_slot, begin, end = slots_of_queries(query_start, key_start, batch, query, real, S, T, BLOCK_N)

        # With u[h] = sum_n dI[n] [dots > 0] k[n]: dq[h] = w[h] u[h] and dw[h] = q[h] . u[h], both times the scale.
        u_t = tl.zeros([BLOCK_D, BLOCK_Q * BLOCK_H], tl.float32)
        for first in range(begin, end, BLOCK_N):
            key = first + tl.arange(0, BLOCK_N)
            exists = seen_keys(key, key_mask, batch, T)
            k_tile = _keys(k, batch, key, T, D, BLOCK_D)
            dots = tl.dot(k_tile, tl.trans(q_tile))
            score = _tile_scores(dots, weight, BLOCK_N, BLOCK_Q, BLOCK_H)
            rows = (batch, query, first_query, last_query, last_slot, first_slot)
            d_score = _score_gradient(score, target, lse, rows, key, exists, S, T, target_stride_b)
            active = _active(dots, d_score * GRADIENT_SCALE, k_tile.dtype, BLOCK_N, BLOCK_Q, BLOCK_H)
            u_t = tl.dot(tl.trans(k_tile), active, acc=u_t)
        upstream = tl.load(grad + batch * S + query, mask=real, other=0.0) / GRADIENT_SCALE
        upstream = tl.reshape(tl.broadcast_to(upstream[:, None], [BLOCK_Q, BLOCK_H]), [BLOCK_Q * BLOCK_H])
        u_t *= upstream[None, :]
        offs_d = tl.arange(0, BLOCK_D)
        offs = row[None, :] * D + offs_d[:, None]
        offs_mask = mask[None, :] & (offs_d < D)[:, None]
        q_t = tl.load(q + offs, mask=offs_mask, other=0.0).to(tl.float32)
        dw = tl.sum(u_t * q_t, 0) * scale
        tl.store(grad_weights + row, dw.to(grad_weights.dtype.element_ty), mask=mask)
        tl.store(grad_q + offs, (u_t * weight[None, :]).to(grad_q.dtype.element_ty), mask=offs_mask)

    @triton.jit
    def _dense_kl_grad_k_kernel(
        grad,
        largest,
        q,
        k,
        weights,
        target,
        lse,
        grad_k,
        query_start,
        key_start,
        key_mask,
        scale,
        first_query,
        last_query,
        S,
        T,
        target_stride_b,
        H: tl.constexpr,
        D: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_N: tl.constexpr,
        GRADIENT_SCALE: tl.constexpr,
    ):
        batch = tl.program_id(1).to(tl.int64)
        lowest_key = tl.program_id(0) * BLOCK_N
        key = lowest_key + tl.arange(0, BLOCK_N)
        exists = seen_keys(key, key_mask, batch, T)
        k_tile = _keys(k, batch, key, T, D, BLOCK_D)
        top_grad = tl.load(largest)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        # Queries before the first that can see a key of this block have nothing to add.
        reach = tl.maximum(lowest_key - tl.load(query_start + batch), first_query).to(tl.int32)
        begin = first_query + (reach - first_query) // BLOCK_Q * BLOCK_Q
        for start in range(begin, last_query, BLOCK_Q):
            query = (start + tl.arange(0, BLOCK_Q)).to(tl.int64)
            real = query < last_query
            q_tile, weight, _, _ = _index_rows(q, weights, scale, batch, query, last_query, S, H, D, BLOCK_H, BLOCK_D)
            last_slot, first_slot = last_and_first_slot(query_start, key_start, batch, query, real, S)
            dots = tl.dot(k_tile, tl.trans(q_tile))
            score = _tile_scores(dots, weight, BLOCK_N, BLOCK_Q, BLOCK_H)
            rows = (batch, query, first_query, last_query, last_slot, first_slot)
            d_score = _score_gradient(score, target, lse, rows, key, exists, S, T, target_stride_b)
            upstream = tl.load(grad + batch * S + query, mask=real, other=0.0) / top_grad
            d_score = d_score * (upstream * GRADIENT_SCALE)[None, :]
            active = _active(dots, d_score, k_tile.dtype, BLOCK_N, BLOCK_Q, BLOCK_H)
            weighted = (q_tile.to(tl.float32) * weight[:, None]).to(k_tile.dtype)
            dk = tl.dot(active, weighted, acc=dk)
        offs_d = tl.arange(0, BLOCK_D)
        dk_ptr = grad_k + (batch * T + key)[:, None] * D + offs_d[None, :]
        dk_mask = (key < T)[:, None] & (offs_d < D)[None, :]
        dk = tl.load(dk_ptr, mask=dk_mask, other=0.0) + dk * (top_grad / GRADIENT_SCALE)
        tl.store(dk_ptr, dk, mask=dk_mask)
