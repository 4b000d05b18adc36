"""The lightning indexer in PyTorch: what `lightning_indexer` means, on any device, in bounded memory.

Legend: B batch, S queries, T keys, H indexer heads, D indexer head width, K selected keys.
"""

from __future__ import annotations

import torch

from ..common.kernel_launch import is_capturing

# Largest score block [B, chunk, T] in bytes; queries are taken in chunks that fit, and small enough that keys behind a
# whole chunk are often skipped.
SCORE_BLOCK_BYTES = 64 * 2**20
MAX_CHUNK = 256


def lightning_indexer_reference(
    q_BSHD: torch.Tensor,
    k_BTD: torch.Tensor,
    weights_BSH: torch.Tensor,
    topk: int,
    scale: float,
    query_start: torch.Tensor,
    key_mask: torch.Tensor | None,
    key_start_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result as `lightning_indexer`; scores in fp32, or in fp64 for fp64 inputs."""
    B, S = q_BSHD.shape[:2]
    T = k_BTD.shape[1]
    indices = torch.empty(B, S, min(topk, T), dtype=torch.int32, device=q_BSHD.device)
    if indices.numel() == 0:
        return indices
    starts = query_start.expand(B)
    # Keys behind the last query of a chunk are invisible to all of it; reading the start is free on the CPU only.
    last_start = int(starts.max()) if starts.device.type == "cpu" else None
    chunk = min(MAX_CHUNK, max(1, SCORE_BLOCK_BYTES // (B * T * 4)))
    for first in range(0, S, chunk):
        rows = slice(first, min(first + chunk, S))
        end = T if last_start is None else max(1, min(T, last_start + rows.stop))
        scores = indexer_scores(q_BSHD[:, rows], k_BTD[:, :end], weights_BSH[:, rows], scale)
        first_keys = None if key_start_BS is None else key_start_BS[:, rows]
        mask = _rows_of(key_mask, rows, end)
        seen = visible_keys(starts + rows.start, rows.stop - rows.start, end, mask, first_keys)
        selected = select_topk(scores.masked_fill_(~seen, float("-inf")), indices.shape[-1])
        indices[:, rows, : selected.shape[-1]] = selected
        indices[:, rows, selected.shape[-1] :] = -1
    return indices


def indexer_scores(q_BSHD: torch.Tensor, k_BTD: torch.Tensor, weights_BSH: torch.Tensor, scale: float) -> torch.Tensor:
    """`sum_h weights[s,h] * relu(scale * q[s,h] . k[t])`, `[B, S, T]` (DeepSeek-V3.2 report, equation 1).

    One head at a time, so that no `[S, H, T]` tensor is made.
    """
    dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
    q_HBSD, k_BDT = q_BSHD.to(dtype).permute(2, 0, 1, 3), k_BTD.to(dtype).transpose(1, 2)
    weights_HBS1 = (weights_BSH.to(dtype) * scale).permute(2, 0, 1).unsqueeze(-1)
    scores = torch.zeros((), dtype=dtype, device=q_BSHD.device)
    for q_BSD, weight_BS1 in zip(q_HBSD, weights_HBS1):
        scores = torch.addcmul(scores, (q_BSD @ k_BDT).relu(), weight_BS1)
    return scores


def visible_keys(
    query_start: torch.Tensor,
    num_queries: int,
    num_keys: int,
    key_mask: torch.Tensor | None,
    key_start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which keys each query may see: `[B, S, T]` bool, slots `key_start` to the query's own, by `key_mask`.

    Args:
        query_start: `[B]` or `[]`, the cache slot of the first query.
        num_queries: S.
        num_keys: T.
        key_mask: `[B, T]` or `[B, S, T]` bool, or None.
        key_start: `[B, S]`, the first slot that each query may see, or None.
    """
    device = query_start.device
    slots = query_start.reshape(-1, 1, 1) + torch.arange(num_queries, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    seen = keys <= slots
    if key_start is not None:
        seen = seen & (keys >= key_start.unsqueeze(-1))
    if key_mask is not None:
        seen = seen & (key_mask if key_mask.dim() == 3 else key_mask.unsqueeze(1))
    return seen


def select_topk(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """The `topk` best of each row, ascending by index; ties go to the smaller index, missing ones are -1 at the end.

    Args:
        scores: `[..., T]`, minus infinity or NaN where a key may not be selected.
        topk: K.

    Returns:
        `[..., min(K, T)]` int32.
    """
    T = scores.shape[-1]
    k = min(topk, T)
    # NaN sorts above everything, and equals no threshold.
    scores = scores.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    if is_capturing(scores):
        # Whether there are ties cannot be looked up there.
        return select_topk_by_sorting(scores, k)
    values, order = scores.topk(min(k + 1, T), dim=-1)
    kth = values[..., k - 1 : k]
    tied = (values[..., k:] == kth).any(-1) & (kth > float("-inf")).squeeze(-1)
    values, order = values[..., :k], order[..., :k]
    if tied.any():
        order[tied] = _smallest_indices_at_ties(scores[tied], kth[tied], k)
        values[tied] = kth[tied]
    return _ascending(order, values, T)


def select_topk_by_sorting(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """As `select_topk`, slower, without looking at values: in a stable sort ties keep their order. No NaN."""
    values, order = (part[..., :topk] for part in scores.sort(dim=-1, descending=True, stable=True))
    return _ascending(order, values, scores.shape[-1])


def _ascending(order: torch.Tensor, values: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Selected slots int32, ascending, -1 at the end in place of those whose value is minus infinity."""
    order = order.masked_fill(values == float("-inf"), num_keys).sort(dim=-1).values
    return order.masked_fill(order == num_keys, -1).to(torch.int32)


def _smallest_indices_at_ties(scores: torch.Tensor, kth: torch.Tensor, k: int) -> torch.Tensor:
    """`[R, k]` indices of rows `[R, T]` whose k-th best score occurs more often than there is room for."""
    above, level = scores > kth, scores == kth
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)


def _rows_of(key_mask: torch.Tensor | None, rows: slice, end: int) -> torch.Tensor | None:
    if key_mask is None:
        return None
    return key_mask[:, :end] if key_mask.dim() == 2 else key_mask[:, rows, :end]
