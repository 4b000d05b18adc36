"""Index scores and attention of selected keys in Triton, with the KL between them and its gradient.

One program a query walks its selected keys in blocks of `BLOCK_N`, which lie on the long side of every product (the
heads of one query would not fill it). Forward, the KL is one pass: with t the target and I the scores,
`KL = sum(t (log t - I)) / sum(t) - log sum(t) + log sum(exp I)`. Backward computes the scores again;
`dI = softmax(I) - t / sum(t)` never leaves the chip. Key gradients are added by fp32 atomics, or in the deterministic
mode written out for every entry of a bounded chunk of queries and summed in a fixed order.

Legend: B batch, S queries, T keys, H heads, D width, K selected keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.device_target import DeviceTarget, device_target
from ..common.kernel_constants import ASYNCHRONOUS_PRODUCTS, LARGE_SHARED_MEMORY, LOG2_E, WIDE_LATENT
from ..common.kernel_launch import launcher, rows_contiguous, tile_options
from ..common.triton_support import tl, triton
from ..sparse_mla.sparse_mla_backward_triton import DETERMINISTIC_SCRATCH_BYTES, add_rows_by_slot
from ..sparse_mla.sparse_mla_union_triton import count_keys

# Heads of one product in `selected_attention`; more are taken one block after another.
ATTENTION_HEADS = 64
# Factor on dI while it is in 16 bits: of 2048 keys, the gradient of one is about 1/2048, near fp16's smallest numbers.
GRADIENT_SCALE = 1024.0


class SelectedTile(NamedTuple):
    """Launch shape of the kernels over selected keys."""

    block_n: int
    num_warps: int
    num_stages: int


def index_tile(target: DeviceTarget, backward: bool) -> SelectedTile:
    """Default tile of the index scores over selected keys, forward or backward."""
    backend, arch, _ = target
    if backend == "hip":
        return SelectedTile(64, 4, 1)
    if backward:
        return SelectedTile(64, 4, 3) if arch in ASYNCHRONOUS_PRODUCTS else SelectedTile(64, 8, 1)
    return SelectedTile(64, 4, 3)


def attention_tile(target: DeviceTarget, width: int) -> SelectedTile:
    """Default tile of `selected_attention`: queries and a block or two of latents must fit the shared memory."""
    backend, arch, _ = target
    if backend == "hip":
        return SelectedTile(32, 4, 1)
    if width > WIDE_LATENT and arch not in LARGE_SHARED_MEMORY:
        return SelectedTile(32, 4, 1)
    return SelectedTile(64, 4, 2)


def selected_scores_triton(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, scale: float
) -> torch.Tensor:
    """Arguments and result as `selected_index_scores`; bf16 or fp16, no gradient."""
    scores = torch.full(indices.shape, float("-inf"), dtype=torch.float32, device=q.device)
    _index_forward(q, k, weights, indices, None, scale, scores, None)
    return scores


def indexer_kl_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    target: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL `[B, S]`, and what its gradient needs: lse of the scores and `1 / sum(target)`, `[2, B, S]`, both fp32."""
    kl = torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device)
    stats = torch.zeros(2, *q.shape[:2], dtype=torch.float32, device=q.device)
    _index_forward(q, k, weights, indices, target.contiguous(), scale, kl, stats)
    return kl, stats


def index_backward_triton(
    grad, q, k, weights, indices, target, stats, scale, deterministic
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and weights in their dtypes, from `grad` of the scores `[B, S, K]` or of the KL `[B, S]`."""
    B, S, H, D = q.shape
    T, K = k.shape[1], indices.shape[-1]
    q, k, weights, indices = q.contiguous(), k.contiguous(), weights.contiguous(), indices.contiguous()
    grad = grad.contiguous()
    grad_q, grad_weights = torch.zeros_like(q), torch.zeros_like(weights)
    grad_k = torch.zeros(B, T, D, dtype=torch.float32, device=k.device)
    if B * S * H * T * K == 0:
        return grad_q, grad_k.to(k.dtype), grad_weights
    target = None if target is None else target.contiguous()
    inputs, results = (grad, q, k, weights, indices, target, stats), (grad_q, grad_weights)
    if not deterministic:
        _launch_backward(inputs, results, grad_k, scale, slice(0, B * S), per_entry=False)
        return grad_q, grad_k.to(k.dtype), grad_weights
    step = min(S, max(1, DETERMINISTIC_SCRATCH_BYTES // (K * D * 4)))
    buffer = torch.empty(step, 1, K, D, dtype=torch.float32, device=k.device)
    for batch in range(B):
        for first in range(0, S, step):
            last = min(first + step, S)
            rows = slice(batch * S + first, batch * S + last)
            scratch = buffer[: last - first]
            _launch_backward(inputs, results, scratch, scale, rows, per_entry=True)
            add_rows_by_slot(scratch, indices[batch, first:last], grad_k[batch])
    return grad_q, grad_k.to(k.dtype), grad_weights


def selected_attention_triton(
    q: torch.Tensor, kv: torch.Tensor, lse: torch.Tensor, indices: torch.Tensor, scale: float
) -> torch.Tensor:
    """Arguments and result as `selected_attention`; bf16 or fp16."""
    B, S, H, D = q.shape
    K = indices.shape[-1]
    q, kv = rows_contiguous(q), rows_contiguous(kv)
    indices, lse = indices.contiguous(), lse.float().contiguous()
    probabilities = torch.zeros(B, S, K, dtype=torch.float32, device=q.device)
    if probabilities.numel() == 0 or kv.shape[1] == 0:
        return probabilities
    heads = min(ATTENTION_HEADS, max(16, triton.next_power_of_2(H)))
    constants = latent_blocks(H, D) | {"BLOCK_H": heads, "BLOCK_K": triton.next_power_of_2(K)}
    tile = attention_tile(device_target(q.device), D)
    tensors = (q, kv, lse, indices, probabilities)
    sizes = (scale * LOG2_E, 1.0 / H, S, kv.shape[1], K, *q.stride()[:3], *kv.stride()[:2])
    launcher(_selected_attention_kernel, (B * S,), q)(*tensors, *sizes, **constants, **tile_options(tile))
    return probabilities


def _index_forward(q, k, weights, indices, target, scale, result, stats) -> None:
    B, S, H, D = q.shape
    T, K = k.shape[1], indices.shape[-1]
    if B * S * H * T * K == 0:
        return
    q, k, weights, indices = q.contiguous(), k.contiguous(), weights.contiguous(), indices.contiguous()
    tile = index_tile(device_target(q.device), backward=False)
    tensors = (q, k, weights, indices, target, result, stats)
    sizes = (scale, B * S, S, T, K)
    constants = index_blocks(H, D) | {"BLOCK_K": triton.next_power_of_2(K), "KL": target is not None}
    launcher(_index_forward_kernel, (B * S,), q)(*tensors, *sizes, **constants, **tile_options(tile))


def _launch_backward(inputs, results, grad_k, scale: float, rows: slice, per_entry: bool) -> None:
    """Gradients of some queries: add to `grad_k`, or if `per_entry` write a row for every list entry there."""
    grad, q, k, _, indices, target, _ = inputs
    grad_q, grad_weights = results
    B, S, H, D = q.shape
    K = indices.shape[-1]
    tile = index_tile(device_target(q.device), backward=True)
    sizes = (scale, rows.start, B * S, S, k.shape[1], K)
    constants = index_blocks(H, D) | {"BLOCK_K": triton.next_power_of_2(K), "KL": target is not None}
    launcher(_index_backward_kernel, (rows.stop - rows.start,), grad)(
        *inputs,
        grad_q,
        grad_k,
        grad_weights,
        *sizes,
        PER_ENTRY=per_entry,
        GRADIENT_SCALE=GRADIENT_SCALE,
        **constants,
        **tile_options(tile),
    )


def index_blocks(H: int, D: int) -> dict[str, int]:
    """Constants of the kernels that score with H index heads `D` entries wide, by name."""
    blocks = {"BLOCK_H": max(16, triton.next_power_of_2(H)), "BLOCK_D": max(16, triton.next_power_of_2(D))}
    return {"H": H, "D": D, **blocks}


def latent_blocks(H: int, D: int) -> dict[str, int]:
    """Constants of the kernels that read H heads' queries and latents `D` entries wide, by name."""
    main = 1 << (D.bit_length() - 1)
    return {"H": H, "MAIN": main, "REST": D - main, "BLOCK_REST": max(16, triton.next_power_of_2(max(1, D - main)))}


if triton is not None:
    _LOG2_E = tl.constexpr(LOG2_E)

    @triton.jit
    def _listed_keys(k_batch, key, listed, D: tl.constexpr, BLOCK_D: tl.constexpr):
        """The listed ones of some keys `[BN, BD]`, zeros for the others."""
        offs_d = tl.arange(0, BLOCK_D)
        k_ptr = k_batch + key.to(tl.int64)[:, None] * D + offs_d[None, :]
        mask = listed[:, None]
        if BLOCK_D != D:
            mask = mask & (offs_d < D)[None, :]
        return tl.load(k_ptr, mask=mask, other=0.0)

    @triton.jit
    def _index_forward_kernel(
        q,
        k,
        weights,
        indices,
        target,
        result,
        stats,
        scale,
        rows,
        S,
        T,
        K,
        H: tl.constexpr,
        D: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        KL: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        offs_n = tl.arange(0, BLOCK_N)
        offs_h = tl.arange(0, BLOCK_H)
        offs_d = tl.arange(0, BLOCK_D)
        keys_row = indices + row * K
        count = count_keys(keys_row, K, BLOCK_K)
        # Padded heads have a weight of zero.
        weight = tl.load(weights + row * H + offs_h, mask=offs_h < H, other=0.0).to(tl.float32) * scale
        q_ptr = q + (row * H + offs_h[:, None]) * D + offs_d[None, :]
        q_tile = tl.load(q_ptr, mask=(offs_h < H)[:, None] & (offs_d < D)[None, :], other=0.0)
        k_batch = k + row // S * T * D

        # Kept by lane of the block and reduced once, at the end.
        top = tl.full([BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        mass = tl.zeros([BLOCK_N], tl.float32)
        cross = tl.zeros([BLOCK_N], tl.float32)
        # The keys of block i + 1 are loaded in iteration i, so that the pipeliner can issue the gather a block ahead.
        next_key = tl.load(keys_row + offs_n, mask=offs_n < count, other=-1)
        for first in range(0, count, BLOCK_N):
            key = next_key
            offs_next = first + BLOCK_N + offs_n
            next_key = tl.load(keys_row + offs_next, mask=offs_next < count, other=-1)
            listed = (key >= 0) & (key < T)
            k_tile = _listed_keys(k_batch, key, listed, D, BLOCK_D)
            dots = tl.dot(k_tile, tl.trans(q_tile))  # [BN, BH]
            score = tl.sum(tl.maximum(dots, 0.0) * weight[None, :], 1)  # [BN]
            score = tl.where(listed, score, float("-inf"))
            if KL:
                t = tl.load(target + row * K + first + offs_n, mask=listed, other=0.0).to(tl.float32)
                mass += t
                cross += tl.where(t > 0, t * (tl.log(t) - score), 0.0)
                new_top = tl.maximum(top, score)
                reference = tl.where(new_top == float("-inf"), 0.0, new_top)
                total = total * tl.exp(top - reference) + tl.exp(score - reference)
                top = new_top
            else:
                tl.store(result + row * K + first + offs_n, score, mask=listed)
        if KL:
            row_mass = tl.sum(mass, 0)
            usable = row_mass > 0
            row_mass = tl.where(usable, row_mass, 1.0)
            inverse = tl.where(usable, 1.0 / row_mass, 0.0)
            row_top = tl.where(usable, tl.max(top, 0), 0.0)
            row_total = tl.where(usable, tl.sum(total * tl.exp(top - row_top), 0), 1.0)
            lse = row_top + tl.log(row_total)
            kl = tl.sum(cross, 0) * inverse - tl.log(row_mass) + lse
            tl.store(result + row, tl.where(usable, kl, 0.0))
            tl.store(stats + row, lse)
            tl.store(stats + rows + row, inverse)

    @triton.jit
    def _index_backward_kernel(
        grad,
        q,
        k,
        weights,
        indices,
        target,
        stats,
        grad_q,
        grad_k,
        grad_weights,
        scale,
        first_row,
        rows,
        S,
        T,
        K,
        H: tl.constexpr,
        D: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        KL: tl.constexpr,
        PER_ENTRY: tl.constexpr,
        GRADIENT_SCALE: tl.constexpr,
    ):
        row = first_row + tl.program_id(0).to(tl.int64)
        offs_n = tl.arange(0, BLOCK_N)
        offs_h = tl.arange(0, BLOCK_H)
        offs_d = tl.arange(0, BLOCK_D)
        keys_row = indices + row * K
        count = count_keys(keys_row, K, BLOCK_K)
        weight = tl.load(weights + row * H + offs_h, mask=offs_h < H, other=0.0).to(tl.float32) * scale
        q_offs = (row * H + offs_h[:, None]) * D + offs_d[None, :]
        q_mask = (offs_h < H)[:, None] & (offs_d < D)[None, :]
        q_tile = tl.load(q + q_offs, mask=q_mask, other=0.0)
        k_batch = k + row // S * T * D
        if PER_ENTRY:
            grad_rows = grad_k + tl.program_id(0).to(tl.int64) * K * D
        else:
            grad_rows = grad_k + row // S * T * D
        # The KL's upstream gradient multiplies fp32 sums, not 16-bit operands.
        upstream = 1.0
        if KL:
            lse = tl.load(stats + row)
            inverse = tl.load(stats + rows + row)
            upstream = tl.load(grad + row) / GRADIENT_SCALE

        # With u[h] = sum_n dI[n] [dots > 0] k[n]: dq[h] = w[h] u[h] and dw[h] = q[h] . u[h], both times the scale.
        q_weighted = (q_tile.to(tl.float32) * weight[:, None]).to(q_tile.dtype)
        u_t = tl.zeros([BLOCK_D, BLOCK_H], tl.float32)
        next_key = tl.load(keys_row + offs_n, mask=offs_n < count, other=-1)
        for first in range(0, count, BLOCK_N):
            key = next_key
            offs_k = first + offs_n
            next_key = tl.load(keys_row + offs_k + BLOCK_N, mask=offs_k + BLOCK_N < count, other=-1)
            listed = (key >= 0) & (key < T)
            k_tile = _listed_keys(k_batch, key, listed, D, BLOCK_D)
            dots = tl.dot(k_tile, tl.trans(q_tile))  # [BN, BH]
            if KL:
                score = tl.sum(tl.maximum(dots, 0.0) * weight[None, :], 1)
                t = tl.load(target + row * K + offs_k, mask=listed, other=0.0).to(tl.float32)
                # Rows without a target have no gradient.
                d_score = tl.where(inverse > 0, tl.exp(score - lse) - t * inverse, 0.0) * GRADIENT_SCALE
            else:
                d_score = tl.load(grad + row * K + offs_k, mask=listed, other=0.0).to(tl.float32)
            d_score = tl.where(listed, d_score, 0.0)  # [BN]
            active = tl.where(dots > 0, d_score[:, None], 0.0).to(k_tile.dtype)  # [BN, BH]
            u_t = tl.dot(tl.trans(k_tile), active, acc=u_t)
            dk = tl.dot(active, q_weighted) * upstream  # [BN, BD]
            if PER_ENTRY:
                dk_ptr = grad_rows + offs_k.to(tl.int64)[:, None] * D + offs_d[None, :]
                tl.store(dk_ptr, dk, mask=listed[:, None] & (offs_d < D)[None, :])
            else:
                dk_ptr = grad_rows + key.to(tl.int64)[:, None] * D + offs_d[None, :]
                tl.atomic_add(dk_ptr, dk, mask=listed[:, None] & (offs_d < D)[None, :], sem="relaxed")
        u_t *= upstream
        dq_offs = (row * H + offs_h[None, :]) * D + offs_d[:, None]
        dq_mask = (offs_h < H)[None, :] & (offs_d < D)[:, None]
        q_t = tl.load(q + dq_offs, mask=dq_mask, other=0.0).to(tl.float32)
        dw = tl.sum(u_t * q_t, 0) * scale
        tl.store(grad_weights + row * H + offs_h, dw.to(grad_weights.dtype.element_ty), mask=offs_h < H)
        tl.store(grad_q + dq_offs, (u_t * weight[None, :]).to(grad_q.dtype.element_ty), mask=dq_mask)

    @triton.jit
    def _selected_attention_kernel(
        q,
        kv,
        lse,
        indices,
        probabilities,
        scale_log2,
        inverse_heads,
        S,
        T,
        K,
        q_stride_b,
        q_stride_s,
        q_stride_h,
        kv_stride_b,
        kv_stride_t,
        H: tl.constexpr,
        MAIN: tl.constexpr,
        REST: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_REST: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        batch, query = row // S, row % S
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, MAIN)
        offs_r = tl.arange(0, BLOCK_REST)
        keys_row = indices + row * K
        out_row = probabilities + row * K
        count = count_keys(keys_row, K, BLOCK_K)
        kv_batch = kv + batch * kv_stride_b
        for head_block in range(0, H, BLOCK_H):
            head = head_block + tl.arange(0, BLOCK_H)
            real = head < H
            q_rows = (q + batch * q_stride_b + query * q_stride_s + head.to(tl.int64) * q_stride_h)[:, None]
            q_main = tl.load(q_rows + offs_d[None, :], mask=real[:, None], other=0.0)
            if REST > 0:
                q_rest = tl.load(
                    q_rows + MAIN + offs_r[None, :], mask=real[:, None] & (offs_r < REST)[None, :], other=0.0
                )
            row_lse = tl.load(lse + row * H + head, mask=real, other=float("inf"))
            row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) * _LOG2_E
            next_key = tl.load(keys_row + offs_n, mask=offs_n < count, other=-1)
            for first in range(0, count, BLOCK_N):
                key = next_key
                offs_k = first + offs_n
                next_key = tl.load(keys_row + offs_k + BLOCK_N, mask=offs_k + BLOCK_N < count, other=-1)
                listed = (key >= 0) & (key < T)
                kv_rows = (kv_batch + key.to(tl.int64) * kv_stride_t)[:, None]
                main = tl.load(kv_rows + offs_d[None, :], mask=listed[:, None], other=0.0)
                s = tl.dot(main, tl.trans(q_main))  # [BN, BH]
                if REST > 0:
                    if BLOCK_REST == REST:
                        rest = tl.load(kv_rows + MAIN + offs_r[None, :], mask=listed[:, None], other=0.0)
                    else:
                        rest_mask = listed[:, None] & (offs_r < REST)[None, :]
                        rest = tl.load(kv_rows + MAIN + offs_r[None, :], mask=rest_mask, other=0.0)
                    s = tl.dot(rest, tl.trans(q_rest), acc=s)
                p = tl.sum(tl.exp2(s * scale_log2 - row_lse[None, :]), 1) * inverse_heads
                if H > BLOCK_H:
                    p += tl.load(out_row + offs_k, mask=listed, other=0.0)
                tl.store(out_row + offs_k, p, mask=listed)
