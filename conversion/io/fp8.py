"""Block-scaled fp8 weights, as DeepSeek and GLM publish them: e4m3 values and one fp32 scale a block."""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.block_fp8.block_fp8_format import E4M3, scale_grid
from .sources import ConversionError

FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
SCALE_DTYPES = ("F32", "F8_E8M0")

# All 256 values of e4m3: looking them up is three times as fast on a CPU as torch's conversion.
_VALUES = torch.arange(256, dtype=torch.uint8).view(E4M3).float()


def is_fp8(config: dict[str, Any]) -> bool:
    """Whether a config.json says that its weights are block-scaled fp8."""
    quantisation = config.get("quantization_config")
    return isinstance(quantisation, dict) and quantisation.get("quant_method") == "fp8"


def fp8_block_size(config: dict[str, Any], location: str) -> tuple[int, int] | None:
    """Rows and columns that share an fp8 scale; `None` for an unquantised source.

    Args:
        config: the source's config.json.
        location: how errors name the source.

    Raises:
        ConversionError: quantised otherwise, or a block size that is none.
    """
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return None
    if not is_fp8(config):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise ConversionError(
            f"{location}: quantization_config has quant_method {method!r}: only block-scaled fp8 and unquantised "
            "checkpoints can be converted"
        )
    size = quantisation.get("weight_block_size", [128, 128])
    if not isinstance(size, list) or len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
        raise ConversionError(
            f"{location}: quantization_config has weight_block_size {size!r}: it must be two numbers, as [128, 128]"
        )
    return size[0], size[1]


def dequantise_block(
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Multiply each block by its scale, in fp32, and round once.

    Rows and columns need no multiple of the block: 576 rows (512 + 64, `kv_a_proj_with_mqa`) have 5 rows of scales.
    Works in slabs of block rows, so that beside the result only a few MB are held in fp32.

    Args:
        weight: `[rows, columns]`, float8_e4m3fn.
        scale_inv: `[ceil(rows / block_size[0]), ceil(columns / block_size[1])]`; multiplying by it dequantises,
            whatever its name says.
        block_size: rows and columns that share a scale.
        dtype: of the result.

    Returns:
        `[rows, columns]` in `dtype`.

    Raises:
        ValueError: a grid of scales that does not fit the weight.
    """
    if weight.dim() != 2 or tuple(scale_inv.shape) != scale_grid(weight.shape[0], weight.shape[1], block_size):
        raise ValueError(
            f"scales of shape {tuple(scale_inv.shape)} do not fit a weight of shape {tuple(weight.shape)} "
            f"in blocks of {block_size[0]} x {block_size[1]}"
        )
    rows, columns = weight.shape
    result = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    values = _VALUES.to(weight.device)
    slab = max(1, (1 << 20) // max(1, columns * block_size[0])) * block_size[0]
    for start in range(0, rows, slab):
        codes = weight[start : start + slab].contiguous().view(torch.uint8)  # [slab, columns]
        part = values.index_select(0, codes.view(-1).int()).view(codes.shape)
        scales = scale_inv[start // block_size[0] : -(-(start + len(part)) // block_size[0])].float()
        scales = scales.repeat_interleave(block_size[0], dim=0)[: len(part)]
        part *= scales.repeat_interleave(block_size[1], dim=1)[:, :columns]
        result[start : start + slab] = part.to(dtype)
    return result
