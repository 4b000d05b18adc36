"""Every expert on every token, in two matrix products: the fastest way for models with few, narrow experts.

Routing to experts costs a chain of small kernels an expert, which is most of the time of a model of a few million
parameters. Doing all the work and keeping what the router chose gives the same numbers to rounding.

Legend: N tokens, E experts, M hidden size, I expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "all_experts"


def all_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`[N, M]` through each token's experts; arguments as `IndexCacheExperts.forward`."""
    tokens, experts = hidden_states.shape[0], self.num_experts
    gate_up, down = self.gate_up_proj, self.down_proj  # [E, 2I, M], [E, M, I]
    chosen = top_k_weights.new_zeros(tokens, experts).scatter(1, top_k_index, top_k_weights)
    gate, up = (hidden_states @ gate_up.flatten(0, 1).t()).view(tokens, experts, -1).chunk(2, dim=-1)  # [N, E, I]
    inner = self.act_fn(gate) * up * chosen.unsqueeze(-1).to(up.dtype)
    return (inner.flatten(1) @ down.transpose(1, 2).flatten(0, 1)).to(hidden_states.dtype)


def use_all_experts(model: PreTrainedModel) -> None:
    """Run `model`'s experts this way."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, all_experts_forward)
    # The public setter accepts transformers' own implementations alone.
    model.config._experts_implementation_internal = NAME
