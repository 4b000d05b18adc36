"""The router of DeepSeek's mixture of experts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...kernels.experts.expert_topk import expert_topk, normed_expert_topk, takes_normed_expert_topk
from ..attention.attention_backends import TRITON_ATTENTION
from ..eligibility import why_not_router_kernel


class IndexCacheTopkRouter(nn.Module):
    """Chooses experts by sigmoid scores plus a balancing bias, within the best groups (DeepSeek-V3, section 2.1.2)."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: IndexCacheConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route `[tokens, hidden_size]`: fp32 logits `[tokens, E]`, weights and ids `[tokens, experts per token]`."""
        config = self.config
        with _without_autocast(hidden_states):
            return expert_topk(
                hidden_states,
                self.weight,
                self.e_score_correction_bias,
                config.num_experts_per_tok,
                scaling=config.routed_scaling_factor,
                normalise=config.norm_topk_prob,
                **self._grouping(),
                allow_triton=config._attn_implementation == TRITON_ATTENTION,
            )

    @torch.no_grad()
    def store_exactly(self, dtype: torch.dtype) -> None:
        """Store an fp32 weight in `dtype` where that keeps every number: logits are the same, and kernels take it."""
        weight = self.weight
        if type(weight) is nn.Parameter and not weight.is_meta and weight.dtype == torch.float32 != dtype:
            narrow = weight.to(dtype)
            if torch.equal(narrow.float(), weight):
                self.weight = nn.Parameter(narrow, requires_grad=weight.requires_grad)

    def takes_norm(self, norm: Any, rows: torch.Tensor) -> bool:
        """Whether `normed` serves these few `rows [tokens, hidden_size]`, and nobody watches."""
        return why_not_router_kernel(self, norm) is None and takes_normed_expert_topk(
            rows,
            norm.weight,
            self.weight,
            self.e_score_correction_bias,
            self.config.num_experts_per_tok,
            self.config.n_group,
            self.config.topk_group or 1,
        )

    def normed(self, norm: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`norm(rows)`, and the weights and ids of `forward` for them, in a launch or two."""
        return normed_expert_topk(
            rows,
            norm.weight,
            norm.variance_epsilon,
            self.weight,
            self.e_score_correction_bias,
            self.config.num_experts_per_tok,
            scaling=self.config.routed_scaling_factor,
            normalise=self.config.norm_topk_prob,
            **self._grouping(),
        )

    def _grouping(self) -> dict[str, Any]:
        config = self.config
        masked = float("-inf") if config.masked_group_score is None else config.masked_group_score
        return {"groups": config.n_group, "topk_groups": config.topk_group or 1, "masked_score": masked}


def _without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Routing is decided in fp32, whatever the rest is computed in."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
