"""Rotary position embedding: the angles of the positions, and YaRN's factor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from ...configuration.configuration_indexcache import IndexCacheConfig


class IndexCacheRotaryEmbedding(nn.Module):
    """Cosines and sines of the positions, for every RoPE type that transformers knows."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: IndexCacheConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        assert config.rope_parameters is not None
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self._frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @property
    def _frequencies(self) -> Callable[..., tuple[torch.Tensor, float]]:
        own = self.compute_default_rope_parameters
        return own if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]

    @staticmethod
    def compute_default_rope_parameters(config: IndexCacheConfig, **_: Any) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[R / 2]` of plain RoPE, and the factor 1 on cosines and sines."""
        assert config.rope_parameters is not None
        powers = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float) / config.qk_rope_head_dim
        return config.rope_parameters["rope_theta"] ** -powers, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids [B, S]` to `(cos, sin)`, each `[B, S, R]` in `x`'s dtype."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def yarn_softmax_factor(rope_parameters: dict[str, Any] | None) -> float:
    """YaRN's factor on the attention scale, mscale squared (DeepSeek-V3's code); 1 without `mscale_all_dim`."""
    given = rope_parameters or {}
    mscale = given.get("mscale_all_dim")
    if given.get("rope_type", "default") == "default" or not mscale or given["factor"] <= 1:
        return 1.0
    return (0.1 * mscale * math.log(given["factor"]) + 1.0) ** 2
