"""Linear layers that share their input, run together when decoding makes that worth it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.vector_linear import takes_vector_linear, vector_linear


def linears(x: torch.Tensor, modules: Sequence[nn.Module], allow_triton: bool) -> Sequence[torch.Tensor]:
    """Each module's output for `x [..., D]`; for one or two tokens on a GPU in one launch."""
    if allow_triton and x.shape[:-1].numel() <= 2 and all(map(is_plain_linear, modules)):
        weights: list[Any] = [module.weight for module in modules]
        rows = x.reshape(-1, x.shape[-1])
        if all(module.bias is None for module in modules) and takes_vector_linear(rows, *weights):
            out = vector_linear(rows, weights).view(*x.shape[:-1], -1)
            return out.split([weight.shape[0] for weight in weights], dim=-1)
    return [module(x) for module in modules]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module.weight` is, as it stands, the whole of what `module` computes, but for a bias."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and "forward" not in vars(module)
    )
