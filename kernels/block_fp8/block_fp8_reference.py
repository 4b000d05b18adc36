"""Products with block fp8 weights in PyTorch: with the dequantised weights, and of quantised activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .block_fp8_format import E4M3, E4M3_MAX, dequantise, scales_of, slabs

# Columns of an activation that share a scale.
GROUP = 128


def quantise_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The e4m3 values of `x [T, D]` and the fp32 scale of every 128 columns of a row, `[T, ceil(D / 128)]`.

    The largest entry of a group becomes 448; a group of zeros has scale 1.
    """
    tokens, width = x.shape
    groups = -(-width // GROUP)
    wide = F.pad(x.float(), (0, groups * GROUP - width)).view(tokens, groups, GROUP)
    scales = scales_of(wide.abs().amax(-1))
    # By its reciprocal, as the kernels do.
    values = (wide * (1.0 / scales).unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return values.view(tokens, groups * GROUP)[:, :width].contiguous(), scales


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, block_size: tuple[int, int] = (128, 128)
) -> torch.Tensor:
    """`x W^T` of `x [..., D]` with the dequantised weight `[N, D]`, rounded to `x`'s dtype; slab by slab of it."""
    rows, columns = weight.shape
    parts = [
        F.linear(
            x,
            dequantise(
                weight[first:last],
                scales[first // block_size[0] : -(-last // block_size[0])],
                block_size,
                x.dtype,
            ),
        )
        for first, last in slabs(rows, columns, block_size[0])
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=-1) if parts else x.new_empty(*x.shape[:-1], 0)


def quantised_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, block_size: tuple[int, int] = (128, 128)
) -> torch.Tensor:
    """`x W^T` as `linear_reference`, of quantised activations: sums of 128 products each, added up in fp32 (or wider).

    Slow: its meaning is the point. Blocks must be 128 columns wide, as groups of activations are.
    """
    if block_size[1] != GROUP:
        raise ValueError(f"quantised_linear_reference: blocks must be {GROUP} columns wide, got {block_size}")
    wide = torch.promote_types(x.dtype, torch.float32)
    values, factors = quantise_activations(x)
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=wide, device=x.device)
    for group in range(factors.shape[1]):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        products = values[:, columns].to(wide) @ weight[:, columns].to(wide).t()
        by_row = scales[:, group].to(wide).repeat_interleave(block_size[0])[: weight.shape[0]]
        total += products * factors[:, group, None].to(wide) * by_row
    return total.to(x.dtype)
