"""How much the layers' selections have in common: |A ∩ B| / k, the paper's figure (arXiv 2603.12201, appendix A).

Legend: B windows, S tokens, Q queries looked at, K selected keys, T keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .perplexity import largest_weight

# Queries looked at in each window, evenly spaced; and the largest block of membership marks in bytes.
QUERIES, MARK_BYTES = 512, 256 * 2**20


@dataclass(frozen=True)
class Overlap:
    """The overlap of selections, averaged over queries.

    Attributes:
        layers: the full layers, ascending.
        matrix: fp64 `[N, N]` on the CPU, entry `[i, j]` = |A_i ∩ A_j| / k; symmetric, 1 on the diagonal.
        queries: how many queries it averages over.
    """

    layers: list[int]
    matrix: torch.Tensor
    queries: int

    @property
    def adjacent(self) -> list[float]:
        """Overlap of each full layer with the next one."""
        return torch.diagonal(self.matrix, 1).tolist()


@torch.inference_mode()
def selection_overlap(
    model: PreTrainedModel,
    ids: torch.Tensor,
    queries: int = QUERIES,
    sweep: Callable[[torch.Tensor], None] | None = None,
) -> Overlap:
    """Run windows of tokens through an IndexCache model and compare what its full layers select.

    Only queries that see more than `index_topk` keys count: the others select everything in every layer. Selections
    of these queries alone are kept, so that memory does not grow with length.

    Args:
        model: an IndexCache model.
        ids: integer tokens `[N, S]`, run one window at a time.
        queries: how many queries per window, evenly spaced.
        sweep: runs windows through layers that are streamed, window by window; the model's forward when None.

    Raises:
        ValueError: windows not longer than `index_topk`, so that every layer selects everything; or scores that are no
            numbers, which select nothing.
    """
    topk, num_tokens = model.config.index_topk, ids.shape[1]
    if topk is None or num_tokens <= topk:
        raise ValueError(
            f"windows of {num_tokens} tokens cannot tell selections apart: {topk} keys are selected, so give windows "
            "several times as long"
        )
    rows = torch.linspace(topk, num_tokens - 1, min(queries, num_tokens - topk)).long().unique()
    layers = model.config.share_pattern.full_layers
    total = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for selections in _selections(model, ids, rows, layers, sweep):
        if lacking := [layer for layer, selection in zip(layers, selections) if bool((selection < 0).any())]:
            raise ValueError(
                f"the indexer of layer {lacking[0]} selects too few keys: its scores are not finite "
                f"({largest_weight(model)}), are the checkpoint's weights damaged?"
            )
        for i, selection in enumerate(selections):
            total[i] += _shared_with(selection, selections, num_tokens)
    return Overlap(layers, total / (len(ids) * len(rows) * topk), len(ids) * len(rows))


def _selections(
    model: PreTrainedModel,
    ids: torch.Tensor,
    rows: torch.Tensor,
    layers: list[int],
    sweep: Callable[[torch.Tensor], None] | None,
) -> Iterator[list[torch.Tensor]]:
    """Window by window what each of `layers` selects for the queries `rows`."""
    for windows in ids.split(1) if sweep is None else (ids,):
        found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        hooks = [_recorder(model, layer, rows, found) for layer in layers]
        try:
            if sweep is None:
                model.base_model(input_ids=windows.to(model.device), use_cache=False)
            else:
                sweep(windows)
        finally:
            for hook in hooks:
                hook()
        for window in range(len(windows)):
            device = found[layers[0]][window].device
            yield [found[layer][window].to(device).long() for layer in layers]


def _recorder(
    model: PreTrainedModel, layer: int, rows: torch.Tensor, found: dict[int, list[torch.Tensor]]
) -> Callable[[], None]:
    """Keep the selection of some queries when the layer's indexer runs; returns what takes the hook away."""
    decoder: Any = model.base_model

    def record(module: Any, args: Any, output: torch.Tensor) -> None:
        found[layer].append(output[0, rows.to(output.device)])

    remove: Callable[[], None] = decoder.layers[layer].self_attn.indexer.register_forward_hook(record).remove
    return remove


def _shared_with(selection: torch.Tensor, others: list[torch.Tensor], num_keys: int) -> torch.Tensor:
    """How many keys `selection [Q, K]` shares with each of the others, summed over queries: fp64, on the CPU."""
    counts = torch.zeros(len(others), dtype=torch.float64)
    step = max(1, MARK_BYTES // num_keys)
    for first in range(0, len(selection), step):
        part = selection[first : first + step]
        marks = torch.zeros(len(part), num_keys, dtype=torch.bool, device=part.device).scatter_(1, part, True)
        for j, other in enumerate(others):
            counts[j] += int(marks.gather(1, other[first : first + step]).sum())
    return counts
