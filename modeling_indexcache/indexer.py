"""The lightning indexer as a module: projections, norm, RoPE and index-key cache around the `lightning_indexer` op."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..configuration.configuration_indexcache import IndexCacheConfig
from ..kernels.indexer_quantization import quantized_rows
from ..kernels.lightning_indexer import lightning_indexer
from ..kernels.rotary import rotate, rotate_into
from .attention_backends import TRITON_ATTENTION
from .few_token_linears import linears
from .key_visibility import KeyVisibility
from .latent_cache import append_index_keys

# Largest block of indexer queries in bytes. Queries are taken in blocks that fit, large ones: every block has a tail.
QUERY_BLOCK_BYTES = 512 * 2**20
# Tokens whose hidden states are widened at once for fp32 head weights.
WIDENED_TOKENS = 16384


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
        allow_triton = self.config._attn_implementation == TRITON_ATTENTION
        (k,) = linears(hidden_states, (self.wk,), allow_triton)
        k = self._turn(self.k_norm(k), position_embeddings)
        if self.config.indexer_fp8:
            k = quantized_rows(k, allow_triton)
        keys = append_index_keys(past_key_values, k, self.layer_idx)
        num_keys = keys.shape[1]
        if num_keys <= self.index_topk:
            return visibility.every_index(num_queries, num_keys, batch) if return_all else None
        row_bytes = batch * self.n_heads * self.head_dim * hidden_states.element_size()
        step = num_queries if torch.compiler.is_compiling() else max(1, QUERY_BLOCK_BYTES // row_bytes)
        if step >= num_queries:
            return self._select(hidden_states, q_resid, position_embeddings, keys, visibility)
        chosen = k.new_empty(batch, num_queries, self.index_topk, dtype=torch.int32)
        for first in range(0, num_queries, step):
            rows = slice(first, first + step)
            angles = (position_embeddings[0][:, rows], position_embeddings[1][:, rows])
            seen = visibility.of_queries(first, first + step)
            chosen[:, rows] = self._select(hidden_states[:, rows], q_resid[:, rows], angles, keys, seen)
        return chosen

    def _select(
        self,
        hidden_states: torch.Tensor,
        q_resid: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        visibility: KeyVisibility,
    ) -> torch.Tensor:
        """The selection of some queries among `keys [B, T, D_I]`."""
        allow_triton = self.config._attn_implementation == TRITON_ATTENTION
        (q,) = linears(q_resid, (self.wq_b,), allow_triton)
        q = q.view(*q_resid.shape[:2], self.n_heads, self.head_dim)
        turned = q[..., : self.rope_dim]
        rotate_into(turned, turned, *position_embeddings, self.interleaved, allow_triton)
        return self.select(q, keys, self._head_weights(hidden_states), visibility, quantized_keys=True)

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
            query_start=seen.query_start,
            key_start=seen.key_start,
            key_mask=seen.key_mask,
            fp8=self.config.indexer_fp8,
            quantized_keys=quantized_keys,
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

    def _head_weights(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """fp32 `[B, S, H]`; a wider weight widens a block of tokens at a time."""
        dtype = self.weights_proj.weight.dtype
        blocks = [hidden_states]
        if dtype != hidden_states.dtype and not torch.compiler.is_compiling():
            blocks = hidden_states.split(WIDENED_TOKENS, dim=1)
        weights = [self.weights_proj(block.to(dtype)).float() for block in blocks]
        return (weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)) * self.n_heads**-0.5

    def _turn(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        turned, rest = x.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        return torch.cat((rotate(turned, *position_embeddings, self.interleaved), rest), dim=-1)


def refuse_missing_indexers(config: IndexCacheConfig, missing_keys: Iterable[str], source: object) -> None:
    """Loading found no indexer weights for a full layer.

    Raises:
        ValueError: naming the layers and the mend.
    """
    layers = {int(key.split("layers.")[1].split(".")[0]) for key in missing_keys if ".indexer." in key}
    if layers:
        raise ValueError(
            f"index_share_pattern {config.index_share_pattern!r} makes layers {sorted(layers)} full, but {source} has "
            "no indexer weights for them: mark them 'S', or convert again from the DSA checkpoint with a pattern that "
            "keeps them"
        )
