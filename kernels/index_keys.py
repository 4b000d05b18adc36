"""The rows that the lightning indexer caches: `[rope(k) | k]` of a layer-normed key, in one pass.

Source: the indexer's key path in DeepSeek-V3.2's inference code (LayerNorm, then RoPE on the leading entries).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .index_keys_triton import index_key_rows_triton
from .rotary import rotate_leading
from .triton_support import runs_triton


def index_key_rows(
    k: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    allow_triton: bool = True,
) -> torch.Tensor:
    """LayerNorm, then RoPE of the leading entries.

    Args:
        k: `[B, S, D]`, projected.
        weight: `[D]`, of the norm.
        bias: `[D]`, of the norm.
        eps: of the norm.
        cos: `[B or 1, S, R]`, R at most D.
        sin: likewise.
        interleaved: as `rotary.rotate`.
        allow_triton: use the Triton kernel on CUDA; False is PyTorch anywhere.

    Returns:
        `[B, S, D]`.
    """
    turned = cos.shape[-1]
    if allow_triton and runs_triton(k, weight, bias, cos, sin) and turned & (turned - 1) == 0:
        return index_key_rows_triton(k, weight, bias, eps, cos, sin, interleaved)
    normed = F.layer_norm(k, k.shape[-1:], weight, bias, eps)
    return rotate_leading(normed, cos, sin, interleaved)
