"""Products of many rows with block fp8 weights by cuBLASLt, on Hopper: `torch._scaled_mm` with blocks for scales.

Activations have a scale for each token and 128 columns, made by our kernel where cuBLASLt reads it, and weights one
for each 128 x 128. It takes whole blocks alone, of columns by fours, and tokens by fours.

Source: cuBLAS documentation, "1D and 2D block scaling with 128 elements"; on other devices there is none in fp32.
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch

from ..common.device_target import device_target
from .block_fp8_activations_triton import quantise_activations_triton
from .block_fp8_format import is_ue8m0
from .block_fp8_reference import GROUP

# The first torch whose `_scaled_mm` was seen to take such scales, and the first CUDA whose cuBLASLt does.
LEAST_TORCH, LEAST_CUDA = (2, 11), (12, 9)
# Tokens, and groups of columns, whose scales are 16 bytes.
ALIGNED_TOKENS = ALIGNED_SCALES = 4


def why_not_cublas(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> str | None:
    """Why cuBLASLt does not multiply `x [T, D]` by `weight [N, D]` with `scales`, or None when it does."""
    if not x.is_cuda:
        return f"it needs a CUDA device, not {x.device.type}"
    backend, arch, _ = device_target(x.device)
    if backend != "cuda" or arch != 90:
        return "it is for compute capability 9.0"
    reason = why_no_block_scaling()
    if reason is not None:
        return reason
    if is_ue8m0(scales):
        return "it takes scales in fp32, and these are ue8m0"
    if x.dtype != torch.bfloat16:
        return f"it makes bf16, not {x.dtype}"
    rows, columns = weight.shape
    if rows % GROUP or columns % (ALIGNED_SCALES * GROUP):
        return (
            f"it takes rows by {GROUP} and columns by {ALIGNED_SCALES * GROUP}, and the weight has {rows} x {columns}"
        )
    if not weight.is_contiguous() or weight.data_ptr() % 16 or not scales.is_contiguous() or scales.data_ptr() % 16:
        return "weight and scales must be contiguous, at multiples of 16 bytes"
    return None


@lru_cache
def why_no_block_scaling() -> str | None:
    """Why this torch multiplies no fp8 matrices with scales of blocks, or None when it does."""
    if version_of(torch.__version__) < LEAST_TORCH:
        return f"it needs torch {'.'.join(map(str, LEAST_TORCH))} or newer, this is {torch.__version__}"
    if version_of(torch.version.cuda or "0") < LEAST_CUDA:
        return f"it needs CUDA {'.'.join(map(str, LEAST_CUDA))} or newer, and this torch has {torch.version.cuda}"
    return None


def version_of(text: str) -> tuple[int, ...]:
    """Major and minor number at the beginning of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def block_fp8_linear_cublas(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    base: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """As `block_fp8_linear.block_fp8_linear`, of what `why_not_cublas` has nothing against."""
    tokens = x.shape[0]
    values, factors = quantise_activations_triton(x, -(-tokens // ALIGNED_TOKENS) * ALIGNED_TOKENS)
    return multiply_by_cublas(values, factors, weight, scales, base, out, tokens)


def multiply_by_cublas(
    values: torch.Tensor,
    factors: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    base: torch.Tensor | None,
    out: torch.Tensor | None,
    tokens: int,
) -> torch.Tensor:
    """`base + x W^T` of rows that `quantise_activations_triton` made, of which `tokens` count: bf16 `[tokens, N]`."""
    made = torch._scaled_mm(values, weight.t(), factors, scales.t(), out_dtype=torch.bfloat16)[:tokens]
    if base is None:
        return made if out is None else out.copy_(made)
    return made.add_(base) if out is None else torch.add(made, base, out=out)
