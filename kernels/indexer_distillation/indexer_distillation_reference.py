"""The distillation operations in PyTorch: what they mean, on any device, in bounded memory.

Queries are taken in chunks; a backward pass computes a chunk again instead of keeping its scores.

Legend: B batch, S queries, T keys, H heads, D width of a head or latent, K selected keys, c queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from ..lightning_indexer.lightning_indexer_reference import indexer_scores

# Largest block of scores or gathered keys of a chunk in bytes.
BLOCK_BYTES = 64 * 2**20


def selected_index_scores_reference(
    q_BSHD: torch.Tensor, k_BTD: torch.Tensor, weights_BSH: torch.Tensor, indices_BSK: torch.Tensor, scale: float
) -> torch.Tensor:
    """Arguments and result as `selected_index_scores`."""
    chunked = (q_BSHD, weights_BSH, indices_BSK)
    row_bytes = indices_BSK.shape[-1] * (q_BSHD.shape[2] + q_BSHD.shape[3]) * 4

    def scores(q, weights, indices, k):
        return _selected_scores(q, k, weights, indices, scale)

    return _in_chunks(scores, chunked, (k_BTD,), row_bytes)


def selected_attention_reference(
    q_BSHD: torch.Tensor, kv_BTD: torch.Tensor, lse_BSH: torch.Tensor, indices_BSK: torch.Tensor, scale: float
) -> torch.Tensor:
    """Arguments and result as `selected_attention`."""
    chunked = (q_BSHD, lse_BSH, indices_BSK)
    row_bytes = indices_BSK.shape[-1] * (q_BSHD.shape[2] + q_BSHD.shape[3]) * 4

    def probabilities(q, lse, indices, kv):
        picked, valid = _picked(kv, indices, q.dtype)
        scores = (q.to(picked.dtype) @ picked.transpose(2, 3)) * scale  # [B, c, H, K]
        scores = scores - _finite(lse).unsqueeze(-1)
        return scores.exp().mean(2).masked_fill(~valid, 0.0)

    return _in_chunks(probabilities, chunked, (kv_BTD,), row_bytes)


def indexer_kl_reference(
    q_BSHD: torch.Tensor,
    k_BTD: torch.Tensor,
    weights_BSH: torch.Tensor,
    indices_BSK: torch.Tensor,
    target_BSK: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Arguments and result as `indexer_kl`."""
    chunked = (q_BSHD, weights_BSH, indices_BSK, target_BSK)
    row_bytes = indices_BSK.shape[-1] * (q_BSHD.shape[2] + q_BSHD.shape[3]) * 4

    def kl(q, weights, indices, target, k):
        listed = (indices >= 0) & (indices < k.shape[1])
        return _kl_to_softmax(target, _selected_scores(q, k, weights, indices, scale), listed)

    return _in_chunks(kl, chunked, (k_BTD,), row_bytes)


def attention_lse_reference(
    q_BSHD: torch.Tensor,
    kv_BTD: torch.Tensor,
    scale: float,
    query_start_B: torch.Tensor,
    key_start_BS: torch.Tensor | None,
    key_mask_BT: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments and result as `attention_lse`; `query_start` one entry per batch row."""
    chunked = (q_BSHD, *_slots(q_BSHD, query_start_B, key_start_BS))

    def lse(q, slots, starts, kv):
        seen = _seen(slots, starts, kv.shape[1], key_mask_BT)
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bshd,btd->bsht", q.to(dtype), kv.to(dtype)) * scale
        return scores.masked_fill(~seen.unsqueeze(2), float("-inf")).logsumexp(-1)

    return _in_chunks(lse, chunked, (kv_BTD,), kv_BTD.shape[1] * q_BSHD.shape[2] * 8)


def dense_indexer_kl_reference(
    q_BSHD: torch.Tensor,
    k_BTD: torch.Tensor,
    weights_BSH: torch.Tensor,
    q_attn: list[torch.Tensor],
    kv: list[torch.Tensor],
    attn_lse: list[torch.Tensor],
    scale: float,
    attn_scale: float,
    query_start_B: torch.Tensor,
    key_start_BS: torch.Tensor | None,
    key_mask_BT: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments and result as `dense_indexer_kl`: one list entry per served layer, one `query_start` per batch row."""
    layers, T = len(q_attn), k_BTD.shape[1]
    chunked = (q_BSHD, weights_BSH, *_slots(q_BSHD, query_start_B, key_start_BS), *q_attn, *attn_lse)

    def kl(q, weights, slots, starts, *rest):
        layer_q, layer_lse, k = rest[:layers], rest[layers : 2 * layers], rest[2 * layers]
        seen = _seen(slots, starts, T, key_mask_BT)
        with torch.no_grad():
            target = sum(_head_mean(*layer, attn_scale, seen) for layer in zip(layer_q, kv, layer_lse)) / layers
        return _kl_to_softmax(target, indexer_scores(q, k, weights, scale).masked_fill(~seen, float("-inf")), seen)

    # Scores of every indexer head are alive while a chunk's gradient is computed.
    return _in_chunks(kl, chunked, (k_BTD,), T * (q_BSHD.shape[2] + 4) * 4)


def _selected_scores(q, k, weights, indices, scale):
    picked, valid = _picked(k, indices, q.dtype)
    dots = (q.to(picked.dtype) @ picked.transpose(2, 3)).relu()  # [B, c, H, K]
    scores = ((weights.to(picked.dtype) * scale).unsqueeze(2) @ dots).squeeze(2)
    return scores.masked_fill(~valid, float("-inf"))


def _picked(keys_BTD, indices_BsK, dtype):
    """Keys `[B, c, K, D]` of each query in at least fp32, zeros where the index is -1, and which are listed."""
    B, c, K = indices_BsK.shape
    T, D = keys_BTD.shape[1:]
    valid = (indices_BsK >= 0) & (indices_BsK < T)
    if T == 0:
        return keys_BTD.new_zeros(B, c, K, D, dtype=torch.promote_types(dtype, torch.float32)), valid
    rows = torch.arange(B, device=keys_BTD.device).view(B, 1, 1) * T + indices_BsK.masked_fill(~valid, 0)
    picked = keys_BTD.flatten(0, 1).index_select(0, rows.flatten()).view(B, c, K, D)
    # A key that is not listed must not matter, not even by being NaN.
    picked = picked.masked_fill(~valid.unsqueeze(-1), 0.0)
    return picked.to(torch.promote_types(dtype, torch.float32)), valid


def _head_mean(q, kv, lse, scale, seen):
    """Attention probabilities of all visible keys `[B, c, T]`, averaged over heads, one head at a time."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=q.device)
    keys = kv.to(dtype).transpose(1, 2)
    for q_BsD, lse_Bs in zip(q.to(dtype).unbind(2), _finite(lse).unbind(2)):
        scores = (q_BsD @ keys) * scale - lse_Bs.unsqueeze(-1)
        total = total + scores.masked_fill(~seen, float("-inf")).exp()
    return total / q.shape[2]


def _kl_to_softmax(target, scores, valid):
    """`KL(target / its sum || softmax(scores))` over valid entries of the last dimension, 0 without any."""
    target = target.to(scores.dtype).masked_fill(~valid, 0.0)
    total = target.sum(-1, keepdim=True)
    usable = total > 0
    p = target / total.masked_fill(~usable, 1.0)
    # Rows without a key get finite scores, so that no NaN reaches their (zero) gradient.
    scores = scores.masked_fill(~valid, float("-inf")).masked_fill(~usable, 0.0)
    log_q = scores.log_softmax(-1).masked_fill(~valid, 0.0)
    return (torch.special.xlogy(p, p) - p * log_q).sum(-1)


def _slots(q, query_start_B, key_start_BS):
    """Last and first slot that each query sees, `[B, S]` each."""
    S = q.shape[1]
    slots = query_start_B.view(-1, 1) + torch.arange(S, device=q.device)
    return slots, torch.zeros_like(slots) if key_start_BS is None else key_start_BS


def _seen(slots_Bs, starts_Bs, num_keys, key_mask_BT):
    """Which keys each query sees, `[B, c, T]`."""
    keys = torch.arange(num_keys, device=slots_Bs.device)
    seen = (keys <= slots_Bs.unsqueeze(-1)) & (keys >= starts_Bs.unsqueeze(-1))
    return seen if key_mask_BT is None else seen & key_mask_BT.unsqueeze(1)


def _finite(lse):
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _in_chunks(
    function: Callable[..., torch.Tensor],
    chunked: tuple[torch.Tensor, ...],
    whole: tuple[torch.Tensor, ...],
    row_bytes: int,
) -> torch.Tensor:
    """`function(*rows of chunked, *whole)` over chunks of queries (dimension 1), joined."""
    B, S = chunked[0].shape[:2]
    chunk = max(1, BLOCK_BYTES // max(1, B * row_bytes))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*chunked, *whole))
    blocks = []
    # Once for no queries, so that empty results have their gradients too.
    for first in range(0, max(S, 1), chunk):
        arguments = (*(x[:, first : first + chunk] for x in chunked), *whole)
        blocks.append(
            checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
            if needs_grad
            else function(*arguments)
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
