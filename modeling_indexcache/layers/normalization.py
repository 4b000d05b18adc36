"""RMSNorm as a module, and with a gate behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...kernels.norm_rope_linear.rms_norm import rms_norm
from ..attention.attention_backends import TRITON_ATTENTION

# Tokens whose gates are made at once, where no gradient is wanted.
GATED_TOKENS = 16384


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


class IndexCacheGatedNorm(nn.Module):
    """RMSNorm, then a gate of low rank that its output makes for itself (A.X-K2)."""

    def __init__(self, config: IndexCacheConfig, size: int, eps: float) -> None:
        super().__init__()
        assert config.gated_norm_rank is not None
        self.norm = IndexCacheRMSNorm(config, size, eps)
        # The names that its checkpoints have.
        self.W_down = nn.Linear(size, config.gated_norm_rank, bias=False)
        self.W_up = nn.Linear(config.gated_norm_rank, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., size]` to the same; the gate is applied in fp32 or wider."""
        y: torch.Tensor = self.norm(x)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return (y * self._gate(y)).to(y.dtype)
        for part in y.view(-1, y.shape[-1]).split(GATED_TOKENS):
            part *= self._gate(part)
        return y

    def _gate(self, y: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.W_up(F.silu(self.W_down(y)))
        return torch.sigmoid(made.to(torch.promote_types(made.dtype, torch.float32)))


def layer_norm_of(config: IndexCacheConfig, before_experts_or_attention: bool) -> nn.Module:
    """The norm before a layer's attention or feed-forward: gated before attention and experts, where gates are."""
    kind = IndexCacheGatedNorm if before_experts_or_attention and config.gated_norm_rank else IndexCacheRMSNorm
    return kind(config, config.hidden_size, config.rms_norm_eps)
