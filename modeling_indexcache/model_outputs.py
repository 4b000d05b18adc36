"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


@dataclass
class IndexCacheModelOutput(MoeModelOutputWithPast):
    """`MoeModelOutputWithPast`, and with `output_topk_indices=True` the selection of each full layer.

    Attributes:
        topk_indices: one int32 `[B, S, K]` a full layer, key slots ascending, -1 where a query sees fewer keys.
    """

    topk_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class IndexCacheCausalLMOutput(MoeCausalLMOutputWithPast):
    """`MoeCausalLMOutputWithPast`, and with `output_topk_indices=True` the selection of each full layer.

    Attributes:
        topk_indices: one int32 `[B, S, K]` a full layer, key slots ascending, -1 where a query sees fewer keys.
    """

    topk_indices: tuple[torch.Tensor, ...] | None = None
