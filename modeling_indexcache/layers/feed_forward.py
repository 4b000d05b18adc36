"""Feed-forward layers without gradient: blocks of tokens, added to the residual in place, experts in kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...kernels.experts.routed_experts import block_tokens, routed_experts
from ..eligibility import is_fast, why_not_expert_kernels, why_noticed, why_watched
from .block_fp8_modules import BlockFp8Experts, run_block_fp8_experts

# Largest temporary of a dense feed-forward in bytes. Tokens are taken in blocks that fit.
FEED_FORWARD_BLOCK_BYTES = 256 * 2**20
# Parts of a mixture of experts that are modules of this package.
_PARTS = ("gate", "experts", "shared_experts")


class IndexCacheMLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: IndexCacheConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, accumulate: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., hidden_size]` to the same; added in place to `accumulate` if given."""
        if accumulate is None:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        for part, target in zip(row_blocks(x, self.gate_proj), row_blocks(accumulate, self.gate_proj)):
            target += self.down_proj(self.act_fn(self.gate_proj(part)).mul_(self.up_proj(part)))
        return accumulate


def add_feed_forward(mlp: Any, norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`hidden_states += mlp(norm(hidden_states))`, `[..., hidden_size]`, in place and block by block of tokens."""
    named = [part for name, part in mlp.named_children() if name in _PARTS]
    if any(map(why_noticed, named)) or any(map(why_watched, mlp.modules())):
        # Whoever watches or stands in for a part of it sees what that part makes, whole and of all tokens.
        return hidden_states.add_(mlp(norm(hidden_states)))
    rows = hidden_states.view(-1, hidden_states.shape[-1])
    router = getattr(mlp, "gate", None)
    if router is not None and router.takes_norm(norm, rows) and runs_expert_kernels(mlp, rows):
        normed, weights, experts = router.normed(norm, rows)
        run_expert_kernels(mlp, normed, experts, weights, rows)
        return hidden_states
    blocks = -(-rows.shape[0] // _tokens_at_once(mlp, rows))
    if blocks <= 1:
        return mlp(norm(hidden_states), accumulate=hidden_states)
    for part in rows.chunk(blocks):
        mlp(norm(part), accumulate=part)
    return hidden_states


def _tokens_at_once(mlp: Any, hidden_states: torch.Tensor) -> int:
    """Tokens whose temporaries in a feed-forward layer stay bounded."""
    if getattr(mlp, "experts", None) is None:
        return _rows_at_once(hidden_states, mlp.gate_proj)
    return block_tokens(hidden_states, mlp.config.num_experts_per_tok, mlp.config.moe_intermediate_size)


def row_blocks(x: torch.Tensor, wide: nn.Module) -> Iterator[torch.Tensor]:
    """Views of the rows of `x [..., D]`, so many at once that `wide`'s outputs for them stay bounded."""
    return iter(x.view(-1, x.shape[-1]).split(_rows_at_once(x, wide)))


def _rows_at_once(x: torch.Tensor, wide: nn.Module) -> int:
    width = getattr(wide, "out_features", x.shape[-1])
    return max(1, FEED_FORWARD_BLOCK_BYTES // (width * x.element_size()))


def runs_expert_kernels(module: Any, tokens: torch.Tensor) -> bool:
    """Whether `kernels.routed_experts` serves this mixture of experts; see `why_not_expert_kernels`."""
    return is_fast("experts run in PyTorch", why_not_expert_kernels(module, tokens), module, tokens)


def run_expert_kernels(
    module: Any,
    tokens: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    accumulate: torch.Tensor | None = None,
) -> torch.Tensor:
    """A mixture of experts that `runs_expert_kernels`, of `tokens [T, D]` that know their experts `[T, K]`.

    `[T, D]`: routed and shared experts, added in place to `accumulate` if given.
    """
    shared = shared_linears(module)
    if isinstance(module.experts, BlockFp8Experts):
        return run_block_fp8_experts(module.experts, shared, tokens, experts, weights, accumulate)
    routed = module.experts.gate_up_proj, module.experts.down_proj
    of_shared: Any = tuple(linear.weight for linear in shared)
    return routed_experts(tokens, experts, weights, *routed, shared=of_shared, accumulate=accumulate)


def shared_linears(module: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Gate, up and down of the shared expert."""
    shared = module.shared_experts
    return shared.gate_proj, shared.up_proj, shared.down_proj
