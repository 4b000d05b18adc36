"""Linear layers that share their input, run together when decoding makes that worth it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...kernels.block_fp8.block_fp8_linear import block_fp8_vector_linear, takes_block_fp8_vector_linear
from ...kernels.norm_rope_linear.vector_linear import takes_vector_linear, vector_linear
from ..eligibility import is_plain_block_fp8, is_plain_linear, is_plain_norm


def linears(
    x: torch.Tensor,
    modules: Sequence[nn.Module],
    allow_triton: bool,
    norm: nn.Module | None = None,
    base: torch.Tensor | None = None,
) -> Sequence[torch.Tensor]:
    """Each module's output for `x [..., D]`; for one or two tokens on a GPU in one launch.

    Args:
        x: `[..., D]`.
        modules: linear layers.
        allow_triton: use the Triton kernel where it takes these.
        norm: an RMSNorm that `x` has yet to pass, or None.
        base: what is added to the output of a single module, or None.
    """
    if allow_triton and x.shape[:-1].numel() <= 2 and all(map(is_plain_linear, modules)):
        weights: list[Any] = [module.weight for module in modules]
        rows = x.reshape(-1, x.shape[-1])
        if all(module.bias is None for module in modules) and takes_vector_linear(rows, *weights):
            gain: Any = None
            eps: Any = 0.0
            if norm is not None:
                if is_plain_norm(norm) and norm.weight.dtype == x.dtype:
                    gain, eps = norm.weight, norm.variance_epsilon
                else:
                    rows = norm(x).view_as(rows)
            added = None if base is None else base.reshape(rows.shape[0], -1)
            out = vector_linear(rows, weights, gain, eps, added).view(*x.shape[:-1], -1)
            return out.split([weight.shape[0] for weight in weights], dim=-1)
    if allow_triton and x.shape[:-1].numel() <= 2 and all(map(is_plain_block_fp8, modules)):
        made = _block_fp8_vectors(x, modules, norm, base)
        if made is not None:
            return made
    if norm is not None:
        x = norm(x)
    outs = [module(x) for module in modules]
    return outs if base is None else [base + outs[0]]


def _block_fp8_vectors(
    x: torch.Tensor, modules: Sequence[nn.Module], norm: Any, base: torch.Tensor | None
) -> Sequence[torch.Tensor] | None:
    """As `linears`, of plain block fp8 layers; None where the kernel does not take them."""
    layers: Any = modules
    weights, scales = [layer.weight for layer in layers], [layer.weight_scale_inv for layer in layers]
    fuses = norm is not None and is_plain_norm(norm) and norm.weight.dtype == x.dtype
    rows = (x if norm is None or fuses else norm(x)).reshape(-1, x.shape[-1])
    gain, eps = (norm.weight, norm.variance_epsilon) if fuses else (None, 0.0)
    if len({(layer.block_size, grid.dtype) for layer, grid in zip(layers, scales)}) > 1:
        return None
    if any(layer.bias is not None for layer in layers):
        return None
    if not takes_block_fp8_vector_linear(rows, weights, layers[0].block_size):
        return None
    added = None if base is None else base.reshape(rows.shape[0], -1)
    out = block_fp8_vector_linear(rows, weights, scales, gain, eps, added)
    return out.view(*x.shape[:-1], -1).split([weight.shape[0] for weight in weights], dim=-1)
