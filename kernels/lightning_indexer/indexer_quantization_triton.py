"""Rotation, scales and e4m3 values of indexer queries and keys in one Triton kernel, rounded as in PyTorch."""

from __future__ import annotations

import torch

from ..common.device_target import has_capability
from ..common.kernel_launch import launcher

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS = 64


def quantization_runs_in_triton(x: torch.Tensor) -> bool:
    """Whether `quantize_triton` takes `[..., D]`: bf16 or fp16 on CUDA with e4m3 in hardware, D a power of two."""
    width = x.shape[-1]
    return (
        triton is not None
        and x.is_cuda
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.bfloat16, torch.float16)
        and width in (16, 32, 64, 128, 256)
        and has_capability(x.device, 89)
    )


def quantize_triton(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `indexer_quantization.quantize_for_scoring`, for what `quantization_runs_in_triton` accepts."""
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, width = scale.numel(), x.shape[-1]
    if rows:
        grid = (triton.cdiv(rows, ROWS),)
        launcher(quantize_rows_kernel, grid, x)(x, values, scale, rows, width**-0.5, D=width, ROWS=ROWS, num_warps=4)
    return values, scale


if triton is not None:

    @triton.jit(do_not_specialize=["N"])
    def quantize_rows_kernel(x, values, scale, N, norm, D: tl.constexpr, ROWS: tl.constexpr):
        """ROWS of the N rows `[N, D]`: turned by Sylvester's matrix times `norm`, and scaled by powers of two."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        dim = tl.arange(0, D)
        place = row[:, None] * D + dim[None, :]
        inside = (row < N)[:, None]
        tile = tl.load(x + place, mask=inside, other=0.0)
        # Entry (i, j) is 1 or -1 as i & j has an even or odd number of bits.
        parity = dim[:, None] & dim[None, :]
        parity ^= parity >> 4
        parity ^= parity >> 2
        parity ^= parity >> 1
        sign = (1 - 2 * (parity & 1)).to(tile.dtype)
        turned = tl.dot(tile, sign).to(tile.dtype).to(tl.float32)
        turned = (turned * norm).to(tile.dtype).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(turned), 1), 1e-10)  # [ROWS]
        # The power of two from largest / 448 up: its exponent, one more unless the fraction is zero.
        bits = (largest * (1.0 / 448.0)).to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        # A NaN stays one: as a bound it would be a key like others.
        above = tl.maximum(turned * inverse[:, None], -448.0, propagate_nan=tl.PropagateNan.ALL)
        scaled = tl.minimum(above, 448.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(values + place, scaled.to(tl.float8e4nv), mask=inside)
        tl.store(scale + row, (exponent << 23).to(tl.float32, bitcast=True), mask=row < N)
