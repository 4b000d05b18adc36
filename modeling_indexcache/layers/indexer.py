"""The lightning indexer as a module: projections, norm, RoPE and index-key cache around the `lightning_indexer` op."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...kernels.lightning_indexer.indexer_quantization import quantized_rows
from ...kernels.lightning_indexer.lightning_indexer import lightning_indexer
from ...kernels.norm_rope_linear.index_keys import index_key_rows
from ...kernels.norm_rope_linear.rotary import rotate_into, rotate_leading
from ...kernels.norm_rope_linear.vector_linear import wide_vector_linear
from ...kernels.sparse_mla.merged_selection import MergedSelection
from ..attention.attention_backends import TRITON_ATTENTION
from ..attention.key_visibility import KeyVisibility
from ..cache.latent_cache import append_index_keys, index_key_slot
from ..eligibility import is_plain_layer_norm, why_not_in_parts, why_not_wide_vectors
from ..forward_plan import ForwardPlan
from .few_token_linears import linears

# Largest block of indexer queries in bytes. Queries are taken in blocks that fit, large ones: every block has a tail.
QUERY_BLOCK_BYTES = 512 * 2**20
# Blocks are multiples of so many groups of queries, as many as a program of the kernel takes.
QUERY_MULTIPLE = 8
# Tokens whose hidden states are widened at once for fp32 head weights.
WIDENED_TOKENS = 16384


class IndexCacheIndexer(nn.Module):
    """The lightning indexer of a full layer: scores all earlier tokens and selects `index_topk` for each query."""

    def __init__(self, config: IndexCacheConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.q_lora_rank is not None
        assert config.index_topk is not None
        self.config, self.layer_idx = config, layer_idx
        self.n_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.rope_dim, self.interleaved = config.qk_rope_head_dim, config.indexer_rope_interleave
        self.index_topk: int = config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=config.index_k_norm_eps)
        self.weights_proj = nn.Linear(config.hidden_size, self.n_heads, bias=False)

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, q_resid: torch.Tensor, plan: ForwardPlan) -> torch.Tensor | None:
        """Select keys, and cache the new tokens' index keys.

        Args:
            hidden_states: `[B, S, hidden_size]`, normed.
            q_resid: the query latent `[B, S, q_lora_rank]`.
            plan: of the forward.

        Returns:
            int32 `[B, S, min(index_topk, T)]`, or None when no query can have more than `index_topk` keys, unless the
            plan lists selections: dense attention is exact then.
        """
        keys = self.append_keys(hidden_states, plan)
        if self.selects_all(keys):
            every_index = plan.visibility.every_index
            return every_index(q_resid.shape[1], keys.shape[1], keys.shape[0]) if plan.lists_selection else None
        chosen = self.choose(q_resid, self.head_weights(hidden_states), keys, plan)
        assert isinstance(chosen, torch.Tensor)
        return chosen

    def append_keys(self, hidden_states: torch.Tensor, plan: ForwardPlan) -> torch.Tensor:
        """Cache the new tokens' index keys; those of all slots, `[B, T, D_I]`."""
        (k,) = linears(hidden_states, (self.wk,), plan.allow_triton)
        norm = self.k_norm
        slot = None if self.config.indexer_fp8 else index_key_slot(plan.cache, self.layer_idx)
        if is_plain_layer_norm(norm):
            rope = (*plan.angles, self.interleaved)
            k = index_key_rows(k, norm.weight, norm.bias, norm.eps, *rope, plan.allow_triton, slot)
            if slot is not None:
                return k
        else:
            k = rotate_leading(norm(k), *plan.angles, self.interleaved)
        if self.config.indexer_fp8:
            k = quantized_rows(k, plan.allow_triton)
        return append_index_keys(plan.cache, k, self.layer_idx)

    def selects_all(self, keys: torch.Tensor) -> bool:
        """Whether no query can have more than `index_topk` of `keys [B, T, D_I]`."""
        return keys.shape[1] <= self.index_topk

    def choose(
        self,
        q_resid: torch.Tensor,
        weights: torch.Tensor,
        keys: torch.Tensor,
        plan: ForwardPlan,
        group: int = 1,
    ) -> torch.Tensor | MergedSelection:
        """The selection of queries `[B, S, q_lora_rank]` with head weights `[B, S, H]` among keys `[B, T, D_I]`.

        int32 `[B, S, index_topk]`, or with a `group` the lists of so many adjacent queries merged.
        """
        batch, num_queries = q_resid.shape[:2]
        row_bytes = batch * self.n_heads * self.head_dim * q_resid.element_size()
        step = num_queries if torch.compiler.is_compiling() else max(1, QUERY_BLOCK_BYTES // row_bytes)
        if step >= num_queries and group == 1:
            return self._select(q_resid, weights, keys, plan)
        # Blocks of equal size, and of whole groups.
        blocks = -(-num_queries // step)
        step = -(-num_queries // (blocks * group * QUERY_MULTIPLE)) * group * QUERY_MULTIPLE
        chosen: torch.Tensor | MergedSelection
        if group > 1:
            chosen = MergedSelection.empty(batch, num_queries, self.index_topk, group, q_resid.device)
        else:
            chosen = torch.empty(batch, num_queries, self.index_topk, dtype=torch.int32, device=q_resid.device)
        for first in range(0, num_queries, step):
            rows = slice(first, first + step)
            selected = self._select(q_resid[:, rows], weights[:, rows], keys, plan.of_queries(first, first + step))
            if isinstance(chosen, MergedSelection):
                chosen.fill(first, selected, keys.shape[1])
            else:
                chosen[:, rows] = selected
        return chosen

    def _select(
        self, q_resid: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, plan: ForwardPlan
    ) -> torch.Tensor:
        """The selection of some queries among `keys [B, T, D_I]`."""
        (q,) = linears(q_resid, (self.wq_b,), plan.allow_triton)
        q = q.view(*q_resid.shape[:2], self.n_heads, self.head_dim)
        q_rope = q[..., : self.rope_dim]
        rotate_into(q_rope, q_rope, *plan.angles, self.interleaved, plan.allow_triton)
        return self.select(q, keys, weights, plan.visibility, quantized_keys=True)

    @torch.no_grad()
    def select(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        weights: torch.Tensor,
        visibility: KeyVisibility,
        quantized_keys: bool = False,
    ) -> torch.Tensor:
        """The selection int32 `[B, S, min(index_topk, T)]` of queries `[B, S, H, D_I]` among keys `[B, T, D_I]`.

        `quantized_keys`: with `indexer_fp8`, the keys were quantised when they were cached.
        """
        seen = visibility.for_keys(keys.shape[1])
        return lightning_indexer(
            q,
            keys,
            weights,
            self.index_topk,
            **seen.limits(),
            fp8=self.config.indexer_fp8,
            quantized_keys=quantized_keys,
            allow_triton=self.config._attn_implementation == TRITON_ATTENTION,
        )

    def project(
        self, hidden_states: torch.Tensor, q_resid: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For training: queries `[B, S, H, D]`, keys `[B, S, D]` and head weights `[B, S, H]`, differentiable."""
        q = self.wq_b(q_resid).view(*hidden_states.shape[:2], self.n_heads, self.head_dim)
        q = rotate_leading(q, *angles, self.interleaved)
        k = rotate_leading(self.k_norm(self.wk(hidden_states)), *angles, self.interleaved).to(q.dtype)
        weights = self.weights_proj(hidden_states.to(_dtype(self.weights_proj, hidden_states)))
        return q, k, weights.to(torch.promote_types(weights.dtype, torch.float32)) * self.n_heads**-0.5

    def head_weights(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """fp32 `[B, S, H]`, of an fp32 weight in fp32 arithmetic."""
        module, rows = self.weights_proj, hidden_states.flatten(0, -2)
        dtype = _dtype(module, hidden_states)
        if why_not_wide_vectors(self.config, module, rows) is None:
            return wide_vector_linear(rows, module.weight, self.n_heads**-0.5).view(*hidden_states.shape[:-1], -1)
        if why_not_in_parts(module, rows) is None:
            # An fp32 number is the sum of three bf16 numbers, and their products with bf16 are exact in fp32.
            high = module.weight.to(rows.dtype)
            middle = (module.weight - high).to(rows.dtype)
            low = (module.weight - high - middle).to(rows.dtype)
            parts = torch.mm(rows, torch.cat((high, middle, low)).t(), out_dtype=dtype)
            weights = parts.view(-1, 3, self.n_heads).sum(1).view(*hidden_states.shape[:-1], -1)
            return weights * self.n_heads**-0.5
        blocks = [hidden_states]
        if dtype != hidden_states.dtype and not torch.compiler.is_compiling():
            blocks = hidden_states.split(WIDENED_TOKENS, dim=1)
        made = [module(block.to(dtype)).float() for block in blocks]
        return (made[0] if len(made) == 1 else torch.cat(made, dim=1)) * self.n_heads**-0.5


def _dtype(module: nn.Module, like: torch.Tensor) -> torch.dtype:
    """Of the weights of a linear layer, whatever wraps it; `like`'s where there are none."""
    weight: torch.Tensor = next(module.parameters(), like)
    return weight.dtype


def refuse_missing_indexers(config: IndexCacheConfig, missing_keys: Iterable[str], source: object) -> None:
    """Loading found no indexer weights for a full layer.

    Raises:
        ValueError: naming the layers and the fix.
    """
    layers = {int(key.split("layers.")[1].split(".")[0]) for key in missing_keys if ".indexer." in key}
    if layers:
        raise ValueError(
            f"index_share_pattern {config.index_share_pattern!r} makes layers {sorted(layers)} full, but {source} has "
            "no indexer weights for them: mark them 'S', or convert again from the DSA checkpoint with a pattern that "
            "keeps them"
        )
