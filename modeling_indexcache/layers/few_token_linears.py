"""Linear layers that share their input, run together when decoding makes that worth it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    rows = x.reshape(-1, x.shape[-1])
    multiply = _in_one_launch(rows, modules) if allow_triton and rows.shape[0] <= 2 else None
    if multiply is None:
        if norm is not None:
            x = norm(x)
        outs = [module(x) for module in modules]
        return outs if base is None else [base + outs[0]]
    gain, eps = None, 0.0
    if norm is not None:
        given: Any = norm
        if is_plain_norm(norm) and given.weight.dtype == x.dtype:
            gain, eps = given.weight, given.variance_epsilon
        else:
            rows = norm(x).view_as(rows)
    out = multiply(rows, gain, eps, None if base is None else base.reshape(rows.shape[0], -1))
    layers: Any = modules
    return out.view(*x.shape[:-1], -1).split([layer.weight.shape[0] for layer in layers], dim=-1)


def _in_one_launch(rows: torch.Tensor, modules: Sequence[nn.Module]) -> Callable[..., torch.Tensor] | None:
    """What multiplies `rows [T, D]`, an RMSNorm's weight and epsilon and what is to be added by all modules at once.

    None where they are not plain layers of one kind without bias, or no kernel takes them.
    """
    layers: Any = modules
    if all(map(is_plain_linear, modules)):
        weights = [layer.weight for layer in layers]
        if all(layer.bias is None for layer in layers) and takes_vector_linear(rows, *weights):
            return lambda rows, *rest: vector_linear(rows, weights, *rest)
    elif all(map(is_plain_block_fp8, modules)):
        weights, scales = [layer.weight for layer in layers], [layer.weight_scale_inv for layer in layers]
        alike = len({(layer.block_size, layer.weight_scale_inv.dtype, layer.bias is None) for layer in layers}) == 1
        fits = alike and layers[0].bias is None
        if fits and takes_block_fp8_vector_linear(rows, weights, layers[0].block_size):
            return lambda rows, *rest: block_fp8_vector_linear(rows, weights, scales, *rest)
    return None
