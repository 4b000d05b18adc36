"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .transformers_compat import CacheUnderBothNames


@dataclass
class IndexerOutputs(CacheUnderBothNames):
    """What both models return besides transformers' own.

    Attributes:
        topk_indices: with `output_topk_indices=True` one int32 `[B, S, K]` a full layer, key slots ascending, -1 where
            a query sees fewer keys.
        indexer_kl: with `indexer_training`: fp32 `[layers]`, KL of each layer's attention to the indexer that serves
            it, mean over real tokens, in nats.
        attention_recall: with `IndexerTraining(recall_queries=...)`: fp32 `[layers]`, the share of each layer's
            attention that the selection holds.
    """

    topk_indices: tuple[torch.Tensor, ...] | None = None
    indexer_kl: torch.Tensor | None = None
    attention_recall: torch.Tensor | None = None


@dataclass
class IndexCacheModelOutput(IndexerOutputs, MoeModelOutputWithPast):
    """`MoeModelOutputWithPast` and `IndexerOutputs`."""


@dataclass
class IndexCacheCausalLMOutput(IndexerOutputs, MoeCausalLMOutputWithPast):
    """`MoeCausalLMOutputWithPast` and `IndexerOutputs`."""
