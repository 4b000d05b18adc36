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
