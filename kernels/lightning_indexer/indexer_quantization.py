"""Queries and keys of the lightning indexer in e4m3, as DeepSeek-V3.2's inference code scores them.

Both are rotated by the same Hadamard matrix first, which changes no dot product and spreads outliers over the width,
then scaled by token (queries by token and head) so that the largest entry fits. Scales are powers of two (ue8m0), so
that values times scale are exact in bf16: kernels without fp8 give the same scores, and keys can be cached as such
rows, from which values and scales come back without a change.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..common.argument_checks import check_floats, check_tensors
from ..common.dispatch import Backend, Operation, takes_all
from .indexer_quantization_triton import E4M3_MAX, quantize_triton, why_not_quantize


@lru_cache
def _hadamard(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix `[width, width]` of 1 and -1."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def quantize_for_scoring(x: torch.Tensor, allow_triton: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and quantise indexer queries or keys.

    Args:
        x: `[..., D]`, any float dtype. A width that is no power of two is not rotated.
        allow_triton: on CUDA, one kernel does it where it can.

    Returns:
        e4m3 of shape `[..., D]`, and fp32 scales of shape `[...]`, powers of two: `values * scale` are the entries of
        `x` after a rotation that keeps dot products.

    Raises:
        TypeError: what is no tensor.
        ValueError: another dtype, or no width.
    """
    check_tensors("quantize_for_scoring", x=x)
    check_floats("quantize_for_scoring", x=x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantize_for_scoring: x must be [..., D] with a column, got {tuple(x.shape)}")
    return _QUANTIZE(x.device, x, allow_triton=allow_triton)


def _quantize_in_pytorch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    if width & (width - 1) == 0:
        x = (x @ _hadamard(width, x.dtype, x.device)) * width**-0.5
    return e4m3_of_rows(x)


_QUANTIZE = Operation(
    "quantize_for_scoring",
    Backend("Triton", why_not_quantize, quantize_triton, optional=True),
    Backend("PyTorch", takes_all, _quantize_in_pytorch),
    prefill=lambda new: (new(1, 4096, 128),),
)


def e4m3_of_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The e4m3 values and scales of `[..., D]` without rotation; exact for rows of `quantized_rows`."""
    largest = x.abs().amax(-1).float().clamp(min=1e-10)
    scale = torch.exp2(torch.ceil(torch.log2(largest / E4M3_MAX)))
    values = (x / scale.unsqueeze(-1).to(x.dtype)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values, scale


def quantized_rows(x: torch.Tensor, allow_triton: bool = True) -> torch.Tensor:
    """Values times scales of `quantize_for_scoring`, in `x`'s dtype: keys as a model with fp8 scoring caches them."""
    values, scale = quantize_for_scoring(x, allow_triton)
    return values.to(x.dtype) * scale.unsqueeze(-1).to(x.dtype)
