"""Evaluation of checkpoints whose layers are streamed."""

from __future__ import annotations

import torch

from ..runs.streaming.layer_source import LayerSource
from ..runs.streaming.sweep import Sweeper
from .overlap import Overlap, selection_overlap


def streamed_overlap(source: LayerSource, windows: torch.Tensor) -> Overlap:
    """`selection_overlap` of token ids `[N, S]`, in one sweep."""
    own = source.model.config.share_pattern.letters

    def sweep(ids: torch.Tensor) -> None:
        sweeper = Sweeper(source, ids.split(1))
        for _ in sweeper.run([(window, own) for window in range(len(ids))]):
            pass

    return selection_overlap(source.model, windows, sweep=sweep)
