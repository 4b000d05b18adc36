"""The router of DeepSeek's mixture of experts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration.configuration_indexcache import IndexCacheConfig


class IndexCacheTopkRouter(nn.Module):
    """Chooses experts by sigmoid scores plus a balancing bias, within the best groups (DeepSeek-V3, section 2.1.2)."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: IndexCacheConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route `[tokens, hidden_size]`: fp32 logits `[tokens, E]`, weights and ids `[tokens, experts a token]`."""
        config = self.config
        with _without_autocast(hidden_states):
            logits = F.linear(hidden_states.float(), self.weight.float())
        scores = logits.sigmoid()
        choice = scores + self.e_score_correction_bias
        if config.n_group is not None:
            grouped = choice.view(choice.shape[0], config.n_group, -1)
            group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            groups = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
            outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, groups, False)
            fill = float("-inf") if config.masked_group_score is None else config.masked_group_score
            choice = grouped.masked_fill(outside.unsqueeze(-1), fill).flatten(1)
        experts = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * config.routed_scaling_factor, experts


def _without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Routing is decided in fp32, whatever the rest is computed in."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
