"""Sparse multi-query latent attention in PyTorch: what `sparse_mla` means, on any device, in bounded memory.

Legend: B batch, S queries, T keys, H heads, D latent width with RoPE, V value width, K selected keys.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

# Largest block of gathered latents [B, chunk, K, D] in bytes; queries are taken in chunks that fit.
GATHER_BLOCK_BYTES = 16 * 2**20


def sparse_mla_reference(
    q_BSHD: torch.Tensor, kv_BTD: torch.Tensor, indices_BSK: torch.Tensor, scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as `kernels.sparse_mla.sparse_mla`; computed in fp32, or fp64 for fp64 inputs.

    Differentiable in `q_BSHD` and `kv_BTD`; the backward pass gathers again instead of keeping the gathered latents.
    """
    B, S, _, D = q_BSHD.shape
    K = indices_BSK.shape[-1]
    chunk = max(1, GATHER_BLOCK_BYTES // max(1, B * K * D * 4))
    if kv_BTD.shape[1] == 0:
        # One latent that nobody selects, so that there is something to gather.
        kv_BTD, indices_BSK = kv_BTD.new_zeros(B, 1, D), torch.full_like(indices_BSK, -1)
    needs_grad = torch.is_grad_enabled() and (q_BSHD.requires_grad or kv_BTD.requires_grad)
    blocks = []
    # Once for no queries, so that empty results have their gradients too.
    for first in range(0, max(S, 1), chunk):
        rows = slice(first, min(first + chunk, S))
        args = (q_BSHD[:, rows], kv_BTD, indices_BSK[:, rows], scale, value_dim)
        blocks.append(
            checkpoint(_attend, *args, use_reentrant=False, preserve_rng_state=False) if needs_grad else _attend(*args)
        )
    out, lse = blocks[0] if len(blocks) == 1 else [torch.cat(parts, dim=1) for parts in zip(*blocks)]
    return out, lse


def _attend(
    q_BSHD: torch.Tensor, kv_BTD: torch.Tensor, indices_BSK: torch.Tensor, scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
    B, S, K = indices_BSK.shape
    T = kv_BTD.shape[1]
    valid = (indices_BSK >= 0) & (indices_BSK < T)
    rows = torch.arange(B, device=kv_BTD.device).view(B, 1, 1) * T + indices_BSK.masked_fill(~valid, 0)
    picked = kv_BTD.flatten(0, 1).index_select(0, rows.flatten()).view(B, S, K, kv_BTD.shape[-1])
    picked = picked.to(dtype)
    scores = (q_BSHD.to(dtype) @ picked.transpose(2, 3)) * scale
    scores = scores.masked_fill(~valid.unsqueeze(2), float("-inf"))
    lse = scores.logsumexp(-1)
    # A row that sees no key gives zeros, not NaN.
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    # A key that is not selected must not matter, not even by being NaN.
    values = picked[..., :value_dim].masked_fill(~valid.unsqueeze(-1), 0.0)
    return (weights @ values).to(q_BSHD.dtype), lse


def sparse_mla_reference_backward(
    grad_out_BSHV: torch.Tensor,
    grad_lse_BSH: torch.Tensor,
    q_BSHD: torch.Tensor,
    kv_BTD: torch.Tensor,
    indices_BSK: torch.Tensor,
    out_BSHV: torch.Tensor,
    lse_BSH: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `q_BSHD` and `kv_BTD`, written out: inside an operation of its own nothing is recorded.

    With p the probabilities, `dscores = p (grad_out . v - grad_out . out + grad_lse)`.
    """
    dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
    B, S, _, D = q_BSHD.shape
    T, K, V = kv_BTD.shape[1], indices_BSK.shape[-1], grad_out_BSHV.shape[-1]
    grad_q = torch.zeros_like(q_BSHD, memory_format=torch.contiguous_format)
    grad_kv = kv_BTD.new_zeros(B * T, D, dtype=dtype)
    chunk = max(1, GATHER_BLOCK_BYTES // max(1, B * K * D * 4))
    for first in range(0, S, chunk):
        part = slice(first, min(first + chunk, S))
        indices, q, grad_out = indices_BSK[:, part], q_BSHD[:, part].to(dtype), grad_out_BSHV[:, part].to(dtype)
        valid = (indices >= 0).unsqueeze(2)  # [B, S, 1, K]
        rows = (torch.arange(B, device=kv_BTD.device).view(B, 1, 1) * T + indices.clamp(min=0)).view(-1)
        picked = kv_BTD.reshape(-1, D).index_select(0, rows).view(B, -1, K, D).to(dtype)
        picked = picked.masked_fill(~valid.transpose(2, 3), 0.0)
        lse = lse_BSH[:, part].to(dtype).unsqueeze(-1)
        scores = (q @ picked.transpose(2, 3)) * scale
        weights = torch.exp(scores - lse).masked_fill(~valid, 0.0)
        delta = (grad_out * out_BSHV[:, part].to(dtype)).sum(-1, keepdim=True)
        grad_weights = grad_out @ picked[..., :V].transpose(2, 3)
        grad_scores = weights * (grad_weights - delta + grad_lse_BSH[:, part].to(dtype).unsqueeze(-1)) * scale
        grad_scores = grad_scores.masked_fill(~valid, 0.0)
        grad_q[:, part] = (grad_scores @ picked).to(grad_q.dtype)
        grad_picked = grad_scores.transpose(2, 3) @ q
        grad_picked[..., :V] += weights.transpose(2, 3) @ grad_out
        grad_kv.index_add_(0, rows, grad_picked.view(-1, D))
    return grad_q, grad_kv.view(B, T, D).to(kv_BTD.dtype)
