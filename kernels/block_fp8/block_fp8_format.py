"""Block fp8 weights: what they mean, how they are made of wider ones, and what is refused as such.

Weights are e4m3, and every block of `block_size` rows and columns has a scale that its values are multiplied by; the
last block of each side may be ragged. Scales are fp32, or powers of two of one byte (ue8m0, `torch.float8_e8m0fnu`).

Source: DeepSeek-V3 report, section 3.3 (tiles of 1 x 128 for activations, 128 x 128 for weights, promotion every 128).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..common.argument_checks import check_floats, check_tensors

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# Of weights that are widened at once, in elements: a matrix of a released model is never whole in a wider dtype.
SLAB = 2**24


def is_ue8m0(scales: torch.Tensor) -> bool:
    """Whether scales are powers of two of one byte, which an older torch may not know."""
    return scales.dtype == getattr(torch, "float8_e8m0fnu", None)


def scale_grid(rows: int, columns: int, block_size: tuple[int, int]) -> tuple[int, int]:
    """The shape of the scales of a `[rows, columns]` weight."""
    return -(-rows // block_size[0]), -(-columns // block_size[1])


def check_weight(
    operation: str, name: str, weight: torch.Tensor, scales: torch.Tensor, block_size: tuple[int, int], halves: int = 1
) -> None:
    """A weight `[..., rows, columns]` in e4m3 and its scales, of `halves` matrices one above the other.

    Raises:
        TypeError: what is no tensor.
        ValueError: another dtype, or scales that do not fit.
    """
    check_tensors(operation, **{name: weight, f"{name} scales": scales})
    if scales is None or weight is None:
        raise TypeError(f"{operation}: {name} and its scales must be tensors, got None")
    if weight.dtype != E4M3:
        raise ValueError(f"{operation}: {name} must be float8_e4m3fn, got {weight.dtype}")
    if scales.dtype != torch.float32 and not is_ue8m0(scales):
        raise ValueError(f"{operation}: {name} scales must be float32 or float8_e8m0fnu, got {scales.dtype}")
    if len(block_size) != 2 or any(type(side) is not int or side < 1 for side in block_size):
        raise ValueError(f"{operation}: block_size must be two positive integers, got {block_size!r}")
    if weight.dim() < 2 or weight.shape[-2] % halves:
        raise ValueError(f"{operation}: {name} [..., rows, columns] does not fit: got {tuple(weight.shape)}")
    rows, columns = weight.shape[-2:]
    down, across = scale_grid(rows // halves, columns, block_size)
    wanted = (*weight.shape[:-2], halves * down, across)
    if tuple(scales.shape) != wanted:
        raise ValueError(
            f"{operation}: {name} of {tuple(weight.shape)} in blocks of {block_size[0]} x {block_size[1]} has scales "
            f"of {wanted}, got {tuple(scales.shape)}"
        )


def dequantise(
    weight: torch.Tensor,
    scales: torch.Tensor,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Each block times its scale, in fp32 (or fp64 for fp64), rounded once.

    Args:
        weight: `[..., rows, columns]`, float8_e4m3fn.
        scales: `[..., ceil(rows / block_size[0]), ceil(columns / block_size[1])]`, fp32 or ue8m0.
        block_size: rows and columns that share a scale.
        dtype: of the result.

    Returns:
        `[..., rows, columns]` in `dtype`.

    Raises:
        TypeError: what is no tensor.
        ValueError: another dtype, or scales that do not fit the weight.
    """
    check_weight("dequantise", "weight", weight, scales, block_size)
    if weight.dim() > 2:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for part, of, grid in zip(out.flatten(0, -3), weight.flatten(0, -3), scales.flatten(0, -3)):
            part.copy_(dequantise(of, grid, block_size, dtype))
        return out
    rows, columns = weight.shape
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    for first, last in slabs(rows, columns, block_size[0]):
        grid = scales[first // block_size[0] : -(-last // block_size[0])].to(wide)
        grid = grid.repeat_interleave(block_size[1], dim=1)[:, :columns]
        grid = grid.repeat_interleave(block_size[0], dim=0)[: last - first]
        out[first:last] = grid.mul_(weight[first:last].to(wide))
    return out


def slabs(rows: int, columns: int, block_rows: int) -> list[tuple[int, int]]:
    """Ranges of whole block rows, of about `SLAB` elements each."""
    step = max(1, SLAB // max(1, columns * block_rows)) * block_rows
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def scales_of(largest: torch.Tensor) -> torch.Tensor:
    """What makes e4m3's largest value of the largest magnitude of a block, the same on every device; 1 for zeros."""
    # By a tensor: a GPU multiplies with the reciprocal of a number, which may round otherwise.
    return torch.where(largest > 0, largest / torch.full_like(largest, E4M3_MAX), 1.0)


def quantise_weight(
    weight: torch.Tensor, block_size: tuple[int, int] = (128, 128), ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The e4m3 values and scales of `[rows, columns]`, the largest entry of each block at 448 (or, with ue8m0, below).

    Returns:
        float8_e4m3fn `[rows, columns]`, and scales as `dequantise` takes them: fp32, or ue8m0.

    Raises:
        TypeError: what is no tensor.
        ValueError: no matrix of floats.
    """
    check_tensors("quantise_weight", weight=weight)
    check_floats("quantise_weight", weight=weight)
    if weight.dim() != 2:
        raise ValueError(f"quantise_weight: weight must be [rows, columns], got {tuple(weight.shape)}")
    rows, columns = weight.shape
    down, across = scale_grid(rows, columns, block_size)
    padding = (0, across * block_size[1] - columns, 0, down * block_size[0] - rows)
    blocks = F.pad(weight.float(), padding).view(down, block_size[0], across, block_size[1])
    largest = blocks.abs().amax((1, 3))
    scales = scales_of(largest)
    if ue8m0:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    values = (blocks / scales[:, None, :, None]).view(down * block_size[0], -1)[:rows, :columns]
    values = values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return values, scales.to(torch.float8_e8m0fnu) if ue8m0 else scales
