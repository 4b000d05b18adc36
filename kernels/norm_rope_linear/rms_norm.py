"""RMSNorm, alone and as it makes MLA's cached rows: `[rms(c) | rope(k)]` in one pass.

Source: RMSNorm (Zhang and Sennrich 2019); the cached row of Multi-head Latent Attention (DeepSeek-V2, section 2.1).
"""

from __future__ import annotations

from typing import Any

import torch

from ..common.argument_checks import check_angles, check_floats, check_shape, check_tensors
from ..common.dispatch import Backend, Operation, takes_all
from ..common.triton_support import why_not_fused
from .cache_slot import CacheSlot, check_slot, write_to_slot
from .rms_norm_triton import latent_rows_triton, rms_norm_triton
from .rotary import rotate, why_not_rotated


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, allow_triton: bool = True) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` with statistics in fp32 (fp64 for fp64).

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        eps: added to the mean of squares.
        allow_triton: use the Triton kernel on CUDA; False is PyTorch anywhere.

    Returns:
        `[..., D]`, of the dtype that `weight * x` has.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    check_tensors("rms_norm", x=x, weight=weight)
    check_floats("rms_norm", x=x, weight=weight)
    check_shape("rms_norm", "weight", weight, "[D] of x [..., D]", x.shape[-1:])
    return _NORM(x.device, x, weight, eps, allow_triton=allow_triton)


def _norm_in_pytorch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


_NORM = Operation(
    "rms_norm",
    Backend("Triton", lambda x, weight, eps: why_not_fused(x, weight), rms_norm_triton, optional=True),
    Backend("PyTorch", takes_all, _norm_in_pytorch),
    token=lambda new: (new(1, 1, 2048), new(2048), 1e-6),
)


def latent_rows(
    kv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    allow_triton: bool = True,
    slot: CacheSlot | None = None,
) -> torch.Tensor:
    """The rows that MLA caches, from what `kv_a_proj_with_mqa` gives.

    Args:
        kv: `[B, S, C + R]`.
        weight: `[C]`, of the latent's RMSNorm.
        eps: of the norm.
        cos: `[B or 1, S, R]`.
        sin: likewise.
        interleaved: as `rotary.rotate`.
        allow_triton: use the Triton kernel on CUDA; False is PyTorch anywhere.
        slot: where in a cache to write them, or None: to memory of their own.

    Returns:
        `[B, S, C + R]`: `[rms_norm(c) | rotate(k)]`; with a slot its `rows [B, T, C + R]`.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    check_tensors("latent_rows", kv=kv, weight=weight)
    check_floats("latent_rows", kv=kv, weight=weight)
    if kv.dim() != 3 or weight.dim() != 1 or weight.shape[0] > kv.shape[-1]:
        raise ValueError(
            f"latent_rows: kv [B, S, C + R] and weight [C] do not fit: got {tuple(kv.shape)} and {tuple(weight.shape)}"
        )
    check_angles("latent_rows", kv, cos, sin, kv.shape[-1] - weight.shape[0])
    check_slot("latent_rows", slot, kv)
    return _ROWS(kv.device, kv, weight, eps, cos, sin, interleaved, slot, allow_triton=allow_triton)


def _why_not_rows(
    kv: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor, *_: Any
) -> str | None:
    return why_not_rotated(cos.shape[-1]) or why_not_fused(kv, weight, cos, sin)


def _rows_in_triton(kv: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return write_to_slot(latent_rows_triton, kv, *arguments)


def _rows_in_pytorch(
    kv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    slot: CacheSlot | None,
) -> torch.Tensor:
    latent, k = kv.split([weight.shape[0], kv.shape[-1] - weight.shape[0]], dim=-1)
    k = rotate(k, cos, sin, interleaved)
    rows = torch.cat((_norm_in_pytorch(latent, weight, eps).to(k.dtype), k), dim=-1)
    return rows if slot is None else slot.write(rows)


_ROWS = Operation(
    "latent_rows",
    Backend("Triton", _why_not_rows, _rows_in_triton, optional=True),
    Backend("PyTorch", takes_all, _rows_in_pytorch),
    token=lambda new: (new(1, 1, 576), new(512), 1e-6, new(1, 1, 64), new(1, 1, 64), True, None),
)
