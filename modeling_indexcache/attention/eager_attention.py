"""Plain attention, the oracle of every other backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention that returns its weights.

    `query [B, H, S, D]`, `key [B, H, T, D]`, `value [B, H, T, V]`, bool `attention_mask [B, 1, S, T]` to
    `[B, S, H, V]` and weights `[B, H, S, T]`.
    """
    scores = (query @ key.transpose(2, 3)) * scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
