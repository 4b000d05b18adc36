"""Evaluation of checkpoints whose layers are streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from ..runs.streaming.layer_source import LayerSource
from ..runs.streaming.sweep import Pass, Sweeper
from ..runs.windows.windows import Windows
from .overlap import Overlap, selection_overlap


def last_hidden_states(
    source: LayerSource, batches: Sequence[Windows], passes: Sequence[Pass]
) -> Iterator[tuple[Pass, torch.Tensor]]:
    """The last hidden states `[B, L, E]` of each of `passes`, a batch's number and a pattern's letters.

    In one sweep where their states, which wait for their layer in host memory, fit into half of what of it is free;
    else in as many as it takes, each with whole batches where it can.
    """
    host = torch.device("cpu") if source.device.type == "cuda" else None
    sweeper = Sweeper(source, [batch.ids[:, :-1] for batch in batches], held_on=host)
    for together in _that_fit(source, batches, passes, free_host_bytes() // 2):
        yield from sweeper.run(together)


def free_host_bytes() -> int:
    """Host memory that nothing uses."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _that_fit(
    source: LayerSource, batches: Sequence[Windows], passes: Sequence[Pass], room: int
) -> Iterator[list[Pass]]:
    """`passes` in groups whose states fit into `room` bytes, one pass at least."""
    config = source.model.config
    # Hidden values and selections, each in a piece of pinned memory that may be twice as large.
    a_token = 2 * (config.hidden_size * source.dtype.itemsize + 4 * (config.index_topk or 0))
    together: list[Pass] = []
    left = room
    for batch, letters in sorted(passes):
        size = a_token * batches[batch].ids.numel()
        if together and size > left:
            yield together
            together, left = [], room
        together.append((batch, letters))
        left -= size
    if together:
        yield together


def streamed_overlap(source: LayerSource, windows: torch.Tensor) -> Overlap:
    """`selection_overlap` of token ids `[N, S]`, in one sweep."""
    own = source.model.config.share_pattern.letters

    def sweep(ids: torch.Tensor) -> None:
        sweeper = Sweeper(source, ids.split(1))
        for _ in sweeper.run([(window, own) for window in range(len(ids))]):
            pass

    return selection_overlap(source.model, windows, sweep=sweep)
