"""The lightning indexer as a module: projections, norm, RoPE and index-key cache around the `lightning_indexer` op."""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..configuration.configuration_indexcache import IndexCacheConfig
from ..kernels.lightning_indexer import lightning_indexer
from .attention_backends import TRITON_ATTENTION
from .key_visibility import KeyVisibility
from .latent_cache import append_index_keys
from .rotary_embedding import rotate


class IndexCacheIndexer(nn.Module):
    """The lightning indexer of a full layer: scores all earlier tokens and selects `index_topk` for each query."""

    def __init__(self, config: IndexCacheConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.n_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.rope_dim, self.interleaved = config.qk_rope_head_dim, config.indexer_rope_interleave
        self.index_topk = config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=config.index_k_norm_eps)
        self.weights_proj = nn.Linear(config.hidden_size, self.n_heads, bias=False)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: torch.Tensor,
        q_resid: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        visibility: KeyVisibility,
        past_key_values: Cache | None = None,
        return_all: bool = False,
    ) -> torch.Tensor | None:
        """Select keys, and cache the new tokens' index keys.

        Args:
            hidden_states: `[B, S, hidden_size]`, normed.
            q_resid: the query latent `[B, S, q_lora_rank]`.
            position_embeddings: `(cos, sin)`, each `[B, S, R]`.
            visibility: which keys each query may see.
            past_key_values: the cache, updated in place.
            return_all: list the selection even when it is everything.

        Returns:
            int32 `[B, S, min(index_topk, T)]`, or None when no query can have more than `index_topk` keys: dense
            attention is exact then.
        """
        batch, num_queries = hidden_states.shape[:2]
        k = self._turn(self.k_norm(self.wk(hidden_states)), position_embeddings)
        keys = append_index_keys(past_key_values, k, self.layer_idx)
        num_keys = keys.shape[1]
        if num_keys <= self.index_topk:
            return visibility.every_index(num_queries, num_keys, batch) if return_all else None
        q = self.wq_b(q_resid).view(batch, num_queries, self.n_heads, self.head_dim)
        q = self._turn(q, position_embeddings)
        weights = self.weights_proj(hidden_states.to(self.weights_proj.weight.dtype)).float() * self.n_heads**-0.5
        seen = visibility.for_keys(num_keys)
        return lightning_indexer(
            q,
            keys,
            weights,
            self.index_topk,
            query_start=seen.query_start,
            key_start=seen.key_start,
            key_mask=seen.key_mask,
            fp8=self.config.indexer_fp8,
            allow_triton=self.config._attn_implementation == TRITON_ATTENTION,
        )

    def project(
        self,
        hidden_states: torch.Tensor,
        q_resid: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For training: queries `[B, S, H, D]`, keys `[B, S, D]` and head weights `[B, S, H]`, differentiable."""
        batch, num_queries = hidden_states.shape[:2]
        q = self.wq_b(q_resid).view(batch, num_queries, self.n_heads, self.head_dim)
        q = self._turn(q, position_embeddings)
        k = self._turn(self.k_norm(self.wk(hidden_states)), position_embeddings).to(q.dtype)
        weights = self.weights_proj(hidden_states.to(self.weights_proj.weight.dtype))
        return q, k, weights.to(torch.promote_types(weights.dtype, torch.float32)) * self.n_heads**-0.5

    @torch.no_grad()
    def select(
        self, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visibility: KeyVisibility
    ) -> torch.Tensor:
        """The selection int32 `[B, S, min(index_topk, T)]` for what `project` made, without gradient."""
        batch, num_queries, num_keys = q.shape[0], q.shape[1], keys.shape[1]
        seen = visibility.for_keys(num_keys)
        if num_keys <= self.index_topk:
            return seen.every_index(num_queries, num_keys, batch)
        with torch.autocast(q.device.type, enabled=False):
            return lightning_indexer(
                q,
                keys,
                weights,
                self.index_topk,
                query_start=seen.query_start,
                key_start=seen.key_start,
                key_mask=seen.key_mask,
                fp8=self.config.indexer_fp8,
                allow_triton=self.config._attn_implementation == TRITON_ATTENTION,
            )

    def _turn(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        turned, rest = x.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        return torch.cat((rotate(turned, *position_embeddings, self.interleaved), rest), dim=-1)
