"""Rotation, scales and e4m3 values of indexer queries and keys in one Triton kernel, rounded as in PyTorch.

Legend: N rows of D entries.
"""

from __future__ import annotations

import torch

from ..common.device_target import has_capability
from ..common.kernel_launch import launcher
from ..common.triton_support import HALF_PRECISION, tl, triton

# Largest finite e4m3 value.
E4M3_MAX = 448.0
# Rows of a program, and the widths that it rotates by a product with a square matrix.
ROWS, WIDTHS = 64, (16, 32, 64, 128, 256)


def why_not_quantize(x: torch.Tensor) -> str | None:
    """Why `quantize_triton` does not take `x [..., D]`, or None."""
    if x.dtype not in HALF_PRECISION or x.shape[-1] not in WIDTHS:
        return f"it takes bfloat16 or float16 rows of {', '.join(map(str, WIDTHS))} entries"
    return None if has_capability(x.device, 89) else "e4m3 is in hardware from compute capability 8.9 on"


def quantize_triton(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `indexer_quantization.quantize_for_scoring`, where `why_not_quantize` is None."""
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, width = scale.numel(), x.shape[-1]
    if rows:
        grid = (triton.cdiv(rows, ROWS),)
        launcher(quantize_rows_kernel, grid, x)(x, values, scale, rows, width**-0.5, D=width, ROWS=ROWS, num_warps=4)
    return values, scale


if triton is not None:
    _E4M3_MAX = tl.constexpr(E4M3_MAX)

    @triton.jit(do_not_specialize=["N"])
    def quantize_rows_kernel(x, values, scale, N, norm, D: tl.constexpr, ROWS: tl.constexpr):
        """ROWS of the N rows `[N, D]`: rotated by Sylvester's matrix times `norm`, and scaled by powers of two."""
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
        rotated = tl.dot(tile, sign).to(tile.dtype).to(tl.float32)
        rotated = (rotated * norm).to(tile.dtype).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(rotated), 1), 1e-10)  # [ROWS]
        # The power of two from largest / 448 up: its exponent, one more unless the fraction is zero.
        bits = (largest * (1.0 / _E4M3_MAX)).to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        # A NaN stays one: as a bound it would be a key like others.
        above = tl.maximum(rotated * inverse[:, None], -_E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
        scaled = tl.minimum(above, _E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
        tl.store(values + place, scaled.to(tl.float8e4nv), mask=inside)
        tl.store(scale + row, (exponent << 23).to(tl.float32, bitcast=True), mask=row < N)
