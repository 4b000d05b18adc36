"""What a forward decides once, and every layer reads.

A layer is `(hidden, selection, plan) -> (hidden, selection, report)`.

Legend: B batch, S new tokens, T key slots, R RoPE width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from ..configuration.share_pattern import FULL
from .attention.attention_backends import TRITON_ATTENTION
from .attention.key_visibility import KeyVisibility
from .eligibility import is_fast, why_layers_keep_inputs, why_not_fused, why_not_in_place, why_not_streamed
from .forward_arguments import NO_OPTIONS, ForwardOptions, IndexerTraining
from .parallel.layer_placement import device_of_layer, direct, moved_to
from .selection import EVERY_KEY, Selection

logger = logging.get_logger(__name__)


class LayerReport(NamedTuple):
    """What a layer measured of its attention and the indexer that serves it.

    Attributes:
        kl: mean KL over real tokens, fp32 `[]`.
        recall: the share of attention's mass that the selection holds, fp32 `[]`; None where it was not asked for.
    """

    kl: torch.Tensor
    recall: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class ForwardPlan:
    """One forward of a decoder. Hooks of accelerate move it by `to`; FSDP makes it anew from its fields.

    Attributes:
        mode: `differentiable`: module by module, as transformers' own models run; `streamed`: without gradient, norms
            and residuals fused with what reads them, in blocks of tokens and in place; `recorded`: the same, while a
            decoding step is captured.
        backend: `attn_implementation`.
        letters: the share pattern that runs; `S` with no `F` before it attends to every key.
        visibility: which keys each query may see.
        angles: cosines and sines of the positions, each `[B or 1, S, R]`.
        cache: updated in place by every layer, or None.
        streams_attention: attention makes queries and outputs of a few tokens at a time.
        in_place: layers behind the first may give their outputs the memory of their inputs.
        merge_selections: a selection may be lists merged for adjacent queries.
        lists_selection: indexers list their selection even when it is every key.
        returns_weights: attention returns its weights (eager).
        dropout: probability of dropping an attention weight.
        training: what to measure of the indexers, or None.
    """

    mode: Literal["differentiable", "streamed", "recorded"]
    backend: str
    letters: str
    visibility: KeyVisibility
    angles: tuple[torch.Tensor, torch.Tensor]
    cache: Any = None
    streams_attention: bool = False
    in_place: bool = False
    merge_selections: bool = False
    lists_selection: bool = False
    returns_weights: bool = False
    dropout: float = 0.0
    training: IndexerTraining | None = None

    @classmethod
    def of(
        cls,
        decoder: Any,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        visibility: KeyVisibility | None = None,
        cache: Any = None,
        options: ForwardOptions = NO_OPTIONS,
        keeps_states: bool = False,
    ) -> ForwardPlan:
        """Decide.

        Args:
            decoder: an `IndexCacheModel`.
            hidden_states: embedded tokens, `[B, S, hidden_size]`.
            position_ids: `[B or 1, S]`; behind the cache's when None.
            visibility: causal, and nothing cached, when None.
            cache: as `forward` was given it.
            options: the same.
            keeps_states: what enters layers is kept by the caller: no layer overwrites it, no selection is merged.
        """
        config, num_queries = decoder.config, hidden_states.shape[1]
        if visibility is None:
            visibility = KeyVisibility.of(None, cache, num_queries, hidden_states.device)
        if cache is not None and decoder.gradient_checkpointing and decoder.training:
            # Recomputed layers would append a second time.
            logger.warning_once("Caching is incompatible with gradient checkpointing: layers run without the cache.")
            cache = None
        whole, said_for = why_not_fused(hidden_states), (decoder, hidden_states)
        streams = options.training is None
        if streams:
            reason = why_not_streamed(decoder, hidden_states)
            streams = is_fast("attention makes queries and outputs of all tokens at once", reason, *said_for)
        in_place = num_queries > 1 and not keeps_states
        if in_place:
            reason = whole or why_layers_keep_inputs(decoder.layers, hidden_states.device)
            in_place = is_fast("prefill keeps every layer's input", reason, *said_for)
        return cls(
            mode="differentiable" if whole else "streamed",
            backend=config._attn_implementation,
            letters=decoder._running_pattern.letters,
            visibility=visibility,
            angles=angles_of(decoder, hidden_states, position_ids, visibility),
            cache=cache,
            streams_attention=streams,
            in_place=in_place,
            merge_selections=streams and not keeps_states and config._attn_implementation == TRITON_ATTENTION,
            lists_selection="topk_indices" in options.outputs,
            returns_weights="attentions" in options.outputs and not streams,
            dropout=config.attention_dropout if decoder.training else 0.0,
            training=options.training,
        )

    @classmethod
    def recorded(
        cls, decoder: Any, visibility: KeyVisibility, angles: tuple[torch.Tensor, torch.Tensor], cache: Any
    ) -> ForwardPlan:
        """The plan of a decoding step while it is captured; `cache` has slots that kernels write to."""
        backend, letters = decoder.config._attn_implementation, decoder._running_pattern.letters
        return cls("recorded", backend, letters, visibility, angles, cache, streams_attention=True)

    @property
    def allow_triton(self) -> bool:
        """Whether kernels run where they take the arguments."""
        return self.backend == TRITON_ATTENTION

    @property
    def fuses(self) -> bool:
        """Whether norms and residuals may be fused; not where a layer is run with gradient by an older plan."""
        return self.mode != "differentiable" and not torch.is_grad_enabled()

    @property
    def streams(self) -> bool:
        """Whether attention streams; not where a layer is run with gradient by an older plan."""
        return self.streams_attention and not torch.is_grad_enabled()

    def is_full(self, layer_idx: int) -> bool:
        """Whether a layer selects anew."""
        return self.letters[layer_idx] == FULL

    def overwrites(self, layer_idx: int) -> bool:
        """Whether a layer's output may take its input's memory; the first layer's input is the caller's."""
        return self.in_place and layer_idx > 0

    def may_fuse(self, module: nn.Module, device: torch.device) -> bool:
        """Whether a module's work on tensors of `device` may happen in place, or outside of it."""
        return self.fuses and why_not_in_place(module, device) is None

    def to(self, device: torch.device, non_blocking: bool = False) -> ForwardPlan:
        """The same for layers on `device`; accelerate's hooks move arguments by a method of this name."""
        visibility, angles = self.visibility.to(device), moved_to(self.angles, device)
        stays = visibility is self.visibility and angles[0] is self.angles[0]
        return self if stays else replace(self, visibility=visibility, angles=angles)

    def of_queries(self, first: int, last: int) -> ForwardPlan:
        """The same for queries `first` to `last` alone."""
        cos, sin = self.angles
        angles = cos[:, first:last], sin[:, first:last]
        return replace(self, visibility=self.visibility.of_queries(first, last), angles=angles)

    def mask(self, selection: Selection, first: int, last: int, num_keys: int) -> torch.Tensor:
        """The `[B or 1, last - first, T]` bool mask of what queries `first` to `last` may see and is selected."""
        mask = self.visibility.for_keys(num_keys).rows(first, last, num_keys)
        return mask if selection.listed is None else mask & selection.mask(first, last, num_keys)

    def run(
        self,
        decoder: Any,
        hidden_states: torch.Tensor,
        selection: Selection = EVERY_KEY,
        first: int = 0,
        last: int | None = None,
    ) -> tuple[torch.Tensor, Selection, list[LayerReport | None]]:
        """Run layers `first` to `last`: the hidden states behind them, the selection in use, what each reported."""
        plan, reports = self, []
        # Generation with an early exit sets how many layers run in the config.
        layers = list(decoder.layers)[: decoder.config.num_hidden_layers]
        for layer_idx, layer in enumerate(layers):
            if layer_idx < first or (last is not None and layer_idx >= last):
                continue
            if plan.is_full(layer_idx):
                selection = EVERY_KEY  # frees the memory of a selection that nobody reads any more
            device = device_of_layer(layer, hidden_states.device)
            if not device == hidden_states.device == plan.angles[0].device:
                # Once, where the device changes: accelerate would move all but the hidden states for every layer.
                hidden_states, selection, plan = hidden_states.to(device), selection.to(device), plan.to(device)
            hidden_states, selection, report = direct(layer, device)(hidden_states, selection=selection, plan=plan)
            reports.append(report)
        return hidden_states, selection, reports


def angles_of(
    decoder: Any, hidden_states: torch.Tensor, position_ids: torch.Tensor | None, visibility: KeyVisibility
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions, those of the queries' slots when None."""
    if position_ids is None:
        slots = visibility.query_start + torch.arange(hidden_states.shape[1], device=hidden_states.device)
        position_ids = slots.unsqueeze(0)
    angles: tuple[torch.Tensor, torch.Tensor] = decoder.rotary_emb(hidden_states, position_ids)
    return angles
