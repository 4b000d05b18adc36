"""The rows that the lightning indexer caches: `[rope(k) | k]` of a layer-normed key, in one pass.

Source: the indexer's key path in DeepSeek-V3.2's inference code (LayerNorm, then RoPE on the leading entries).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..common.argument_checks import check_floats, check_shape, check_tensors
from ..common.dispatch import Backend, Operation, takes_all
from ..common.triton_support import why_not_fused
from .cache_slot import CacheSlot, check_slot, write_to_slot
from .index_keys_triton import index_key_rows_triton
from .rotary import check_leading_angles, rotate_leading, why_not_rotated


def index_key_rows(
    k: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    allow_triton: bool = True,
    slot: CacheSlot | None = None,
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
        slot: where in a cache to write them, or None: to memory of their own.

    Returns:
        `[B, S, D]`; with a slot its `rows [B, T, D]`.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    check_tensors("index_key_rows", k=k, weight=weight, bias=bias)
    check_floats("index_key_rows", k=k, weight=weight, bias=bias)
    check_shape("index_key_rows", "weight", weight, "[D] of k [B, S, D]", k.shape[-1:])
    check_shape("index_key_rows", "bias", bias, "[D] of k [B, S, D]", k.shape[-1:])
    check_leading_angles("index_key_rows", k, cos, sin)
    check_slot("index_key_rows", slot, k)
    return _ROWS(k.device, k, weight, bias, eps, cos, sin, interleaved, slot, allow_triton=allow_triton)


def _why_not_triton(k: torch.Tensor, *arguments: Any) -> str | None:
    weight, bias, _, cos, sin, *_ = arguments
    return why_not_rotated(cos.shape[-1]) or why_not_fused(k, weight, bias, cos, sin)


def _in_triton(k: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return write_to_slot(index_key_rows_triton, k, *arguments)


def _in_pytorch(
    k: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    slot: CacheSlot | None,
) -> torch.Tensor:
    normed = F.layer_norm(k, k.shape[-1:], weight, bias, eps)
    rows = rotate_leading(normed, cos, sin, interleaved)
    return rows if slot is None else slot.write(rows)


_ROWS = Operation(
    "index_key_rows",
    Backend("Triton", _why_not_triton, _in_triton, optional=True),
    Backend("PyTorch", takes_all, _in_pytorch),
    token=lambda new: (new(1, 1, 128), new(128), new(128), 1e-6, new(1, 1, 64), new(1, 1, 64), True, None),
)
