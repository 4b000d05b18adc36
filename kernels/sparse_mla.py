"""Sparse MLA: each query attends, in the latent space, to the keys that the lightning indexer selected for it.

Meaning: `sparse_mla_reference.py`. Source: the absorbed form of Multi-head Latent Attention (DeepSeek-V2, section 2.1)
restricted to the selected keys (DeepSeek-V3.2 report, equation 2).
"""

from __future__ import annotations

import torch

from .sparse_mla_reference import sparse_mla_reference


def sparse_mla(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, *, scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax(scale * q . kv[indices]) @ kv[indices, :value_dim]` for every query and head.

    Args:
        q: absorbed queries of shape `[B, S, H, D]`: `[q_nope W_UK | rope(q_rope)]`; bf16, fp16, fp32 or fp64.
        kv: latents of shape `[B, T, D]`: `[c | rope(k_rope)]`, one row a token, shared by all heads.
        indices: int32 of shape `[B, S, K]`: slots in `kv`, -1 where a query has fewer keys (anywhere in the row).
            Causality and padding are the caller's business: whatever is listed is read.
        scale: factor on the dot products.
        value_dim: leading entries of a latent that are its value.

    Returns:
        `out` of shape `[B, S, H, value_dim]` in `q`'s dtype, zero for queries without keys, and `lse` of shape
        `[B, S, H]` in fp32 (natural logarithm; minus infinity for queries without keys).

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """
    if q.dim() != 4 or kv.dim() != 3 or q.shape[0] != kv.shape[0] or q.shape[-1] != kv.shape[-1]:
        raise ValueError(f"q [B, S, H, D] and kv [B, T, D] do not fit: got {tuple(q.shape)} and {tuple(kv.shape)}")
    if indices.dim() != 3 or indices.shape[:2] != q.shape[:2] or indices.dtype != torch.int32:
        raise ValueError(f"indices must be int32 [B, S, K], got {indices.dtype} of {tuple(indices.shape)}")
    if not 0 < value_dim <= kv.shape[-1]:
        raise ValueError(f"value_dim must lie in 1 .. {kv.shape[-1]}, the latent width (got {value_dim})")
    return sparse_mla_reference(q, kv, indices, scale, value_dim)
