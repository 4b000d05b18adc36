"""Which attention backends there are, which one a machine gets, and the plainest of them.

`eager` returns attention weights and is the oracle; `sdpa` is PyTorch on any device; `triton` runs the kernels.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

TRITON_ATTENTION, EAGER_ATTENTION = "triton", "eager"
# Backends of transformers that take no mask of selected keys.
UNSUPPORTED_ATTENTION = ("flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def resolve_attention_backend(requested: str | None) -> str:
    """The backend to run for `attn_implementation=requested`; None asks for the best that this machine runs.

    Raises:
        ValueError: for a backend that cannot run here or cannot follow a selection of keys, saying what to use.
    """
    if requested is None:
        return "sdpa" if triton_unavailable_reason() else TRITON_ATTENTION
    if requested == TRITON_ATTENTION and (reason := triton_unavailable_reason()):
        raise ValueError(f'attn_implementation="triton" cannot run here: {reason}. Use "sdpa"')
    if requested in UNSUPPORTED_ATTENTION:
        raise ValueError(
            f"attn_implementation={requested!r} cannot follow a selection of keys: "
            'use "triton" (CUDA), "sdpa" or "eager"'
        )
    return requested


def triton_unavailable_reason() -> str | None:
    """Why the Triton kernels cannot run on this machine, or None when they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0 or newer, this device has {torch.cuda.get_device_capability()}"
    return None


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
    """Plain attention that returns its weights, the oracle of every other backend.

    `query [B, H, S, D]`, `key [B, H, T, D]`, `value [B, H, T, V]`, bool `attention_mask [B, 1, S, T]` to
    `[B, S, H, V]` and weights `[B, H, S, T]`.
    """
    scores = (query @ key.transpose(2, 3)) * scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
