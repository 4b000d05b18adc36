"""Which keys a layer attends to, as layers hand it on: all of them, or those that the nearest full layer selected."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.sparse_mla.merged_selection import MergedSelection
from .parallel.layer_placement import moved_to


class IndexerTrace(NamedTuple):
    """What a full layer's indexer hands to the layers that it serves, so that their attention teaches it.

    Attributes:
        q: the indexer's queries `[B, S, H_I, D_I]`, differentiable in the indexer's weights alone, as are
        k: its keys `[B, T, D_I]`, and
        weights: its head weights `[B, S, H_I]`.
        indices: the selection, int32 `[B, S, K]`; in the dense stage of the last `recall_queries` queries, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor | None


class Selection(NamedTuple):
    """The keys in use, made by a full layer and reused by the shared layers behind it.

    A tuple, so that FSDP and checkpointing find the tensors in it.

    Attributes:
        listed: int32 `[B, S, K]`, key slots ascending and -1 where a query has fewer; or lists merged for adjacent
            queries; or None for every visible key.
        trace: while the indexers train, what made the selection.
    """

    listed: torch.Tensor | MergedSelection | None = None
    trace: IndexerTrace | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Selection:
        """The same on `device`; accelerate's hooks move arguments by a method of this name."""
        return Selection(*moved_to(tuple(self), device))

    def indices(self) -> torch.Tensor:
        """int32 `[B, S, K]`.

        Raises:
            TypeError: where every key is selected, or lists are merged, which no gradient passes.
        """
        if not isinstance(self.listed, torch.Tensor):
            raise TypeError(
                f"attention with gradient takes a selection as a tensor of indices, not {type(self.listed).__name__}: "
                "run the full layer that made it by a plan without merge_selections"
            )
        return self.listed

    def of_queries(self, first: int, last: int) -> torch.Tensor | MergedSelection:
        """What is listed for queries `first` to `last`, as `sparse_mla` takes it; of merged lists whole groups."""
        if isinstance(self.listed, MergedSelection):
            return self.listed.of_queries(first, last)
        return self.indices()[:, first:last]

    def mask(self, first: int, last: int, num_keys: int) -> torch.Tensor:
        """The `[B, last - first, T]` bool mask of what is listed for queries `first` to `last`."""
        slots = self.indices()[:, first:last].long()
        mask = torch.zeros(*slots.shape[:2], num_keys + 1, dtype=torch.bool, device=slots.device)
        return mask.scatter_(-1, slots.masked_fill(slots < 0, num_keys), True)[..., :num_keys]


EVERY_KEY = Selection()
