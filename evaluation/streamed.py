"""Evaluation of checkpoints whose layers are streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..runs.streaming.layer_source import LayerSource
from ..runs.streaming.sweep import Pass, Sweeper
from ..runs.windows.windows import Windows
from .overlap import Overlap, selection_overlap


def last_hidden_states(
    source: LayerSource, batches: Sequence[Windows], passes: Sequence[Pass]
) -> Iterator[tuple[Pass, torch.Tensor]]:
    """The last hidden states `[B, L, E]` of each of `passes`, a batch's number and a pattern's letters, in one sweep.

    States wait for their layer in host memory.
    """
    host = torch.device("cpu") if source.device.type == "cuda" else None
    return Sweeper(source, [batch.ids[:, :-1] for batch in batches], held_on=host).run(passes)


def streamed_overlap(source: LayerSource, windows: torch.Tensor) -> Overlap:
    """`selection_overlap` of token ids `[N, S]`, in one sweep."""
    own = source.model.config.share_pattern.letters

    def sweep(ids: torch.Tensor) -> None:
        sweeper = Sweeper(source, ids.split(1))
        for _ in sweeper.run([(window, own) for window in range(len(ids))]):
            pass

    return selection_overlap(source.model, windows, sweep=sweep)
