"""Routed experts in the dtype of autocast.

Autocast does not know grouped products: under it, transformers' grouped experts multiply in their weights' dtype. With
the fp32 weights of a training that is fp32, one expert after the other, waiting for the device before them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

GROUPED, NAME = "grouped_mm", "autocast_grouped_mm"
# Entries of a row: grouped products of 16-bit matrices want rows of whole 16 bytes.
ROW_MULTIPLE = 8


class _Cast:
    """An experts module with its weights in another dtype."""

    def __init__(self, experts: Any, dtype: torch.dtype) -> None:
        self._experts = experts
        self.gate_up_proj, self.down_proj = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def autocast_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`[tokens, hidden_size]` through each token's experts; arguments as `IndexCacheExperts.forward`."""
    experts: Any = self
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        experts, hidden_states = _Cast(self, dtype), hidden_states.to(dtype)
    return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)


def use_autocast_experts(model: PreTrainedModel) -> None:
    """Run `model`'s experts this way, if they run grouped and their shapes allow it; otherwise leave them."""
    config: Any = model.config
    fits = not (config.hidden_size % ROW_MULTIPLE or config.moe_intermediate_size % ROW_MULTIPLE)
    if config._experts_implementation == GROUPED and fits:
        ALL_EXPERTS_FUNCTIONS.register(NAME, autocast_experts_forward)
        # The public setter accepts transformers' own implementations alone.
        config._experts_implementation_internal = NAME
