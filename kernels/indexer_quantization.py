"""Queries and keys of the lightning indexer in e4m3, as DeepSeek-V3.2's inference code scores them.

Both are turned by the same Hadamard matrix first, which changes no dot product and spreads outliers over the width,
then scaled by token (queries by token and head) so that the largest entry fits. Scales are powers of two (ue8m0), so
that scaled-back values are exact in bf16: kernels without fp8 give the same scores.
"""

from __future__ import annotations

from functools import lru_cache

import torch

E4M3_MAX = 448.0


@lru_cache
def _hadamard(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix `[width, width]` of 1 and -1."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def quantize_for_scoring(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and quantise indexer queries or keys.

    Args:
        x: `[..., D]`, any float dtype. A width that is no power of two is not rotated.

    Returns:
        e4m3 of shape `[..., D]`, and fp32 scales of shape `[...]`, powers of two: `values * scale` are the entries of
        `x` after a rotation that keeps dot products.
    """
    width = x.shape[-1]
    if width & (width - 1) == 0:
        x = (x @ _hadamard(width, x.dtype, x.device)) * width**-0.5
    largest = x.abs().amax(-1).float().clamp(min=1e-10)
    scale = torch.exp2(torch.ceil(torch.log2(largest / E4M3_MAX)))
    values = (x / scale.unsqueeze(-1).to(x.dtype)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values, scale


def scaled_back(
    q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 queries and keys in a wider dtype, the keys times their scales; exact, for scales are powers of two."""
    return q.to(dtype), k.to(dtype) * k_scale.unsqueeze(-1).to(dtype)
