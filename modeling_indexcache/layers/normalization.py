"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import nn

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...kernels.norm_rope_linear.rms_norm import rms_norm
from ..attention.attention_backends import TRITON_ATTENTION


class IndexCacheRMSNorm(nn.Module):
    """RMSNorm, its statistics in fp32."""

    def __init__(self, config: IndexCacheConfig, size: int, eps: float) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., size]` to the same."""
        allow_triton = self.config._attn_implementation == TRITON_ATTENTION
        return rms_norm(x, self.weight, self.variance_epsilon, allow_triton)
