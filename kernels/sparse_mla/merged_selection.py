"""Selections of adjacent queries merged once, for all the layers that attend by them.

With few heads sparse MLA runs several adjacent queries in one program and reads each key that they select once. The
merged lists take the room of the selection itself, so shared layers are handed the one in place of the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .sparse_mla_triton import QUERIES_PER_LAUNCH, queries_per_wave, selection_group
from .sparse_mla_union_triton import merge_key_lists

# Fewer queries are not worth merging ahead.
LEAST_QUERIES = 2 * QUERIES_PER_LAUNCH


class MergedSelection(NamedTuple):
    """What `sparse_mla` takes in place of `indices`.

    Attributes:
        keys: int32 of shape `[B, ceil(S / group), group * K]`, see `sparse_mla_union_triton.py`.
        counts: int32 of shape `[B, ceil(S / group)]`, leading entries of `keys` that are listed.
        group: adjacent queries per list.
        queries: S.
    """

    keys: torch.Tensor
    counts: torch.Tensor
    group: int
    queries: int

    @classmethod
    def empty(cls, batch: int, queries: int, topk: int, group: int, device: torch.device) -> MergedSelection:
        """Room for the lists of `queries` queries."""
        lists = -(-queries // group)
        keys = torch.empty(batch, lists, group * topk, dtype=torch.int32, device=device)
        return cls(keys, torch.empty(batch, lists, dtype=torch.int32, device=device), group, queries)

    def of_queries(self, first: int, last: int) -> MergedSelection:
        """The lists of the queries `first` to `last` alone; `first` must be a multiple of `group`."""
        if first % self.group:
            raise ValueError(f"merged lists begin at multiples of {self.group} queries, not at {first}")
        lists = slice(first // self.group, -(-last // self.group))
        return MergedSelection(self.keys[:, lists], self.counts[:, lists], self.group, last - first)

    def fill(self, first: int, indices: torch.Tensor, slots: int) -> None:
        """Merge the selection int32 `[B, n, K]` among `slots` key slots of the queries from `first` on."""
        # Two programs per multiprocessor merge, so that launches of as many waves leave none idle. Scratch memory
        # grows with the batch.
        wave = 2 * queries_per_wave(indices.device, 1, self.group)
        step = QUERIES_PER_LAUNCH // indices.shape[0]
        step = step // wave * wave or max(self.group, step // self.group * self.group)
        for start in range(0, indices.shape[1], step):
            rows = indices[:, start : start + step]
            part = self.of_queries(first + start, first + start + rows.shape[1])
            merge_key_lists(rows, self.group, slots, part.keys, part.counts)


def merges_ahead(device: torch.device, heads: int, queries: int, topk: int, slots: int) -> int:
    """How many adjacent queries' selections are worth merging ahead for layers of `heads` heads; 1: none."""
    return selection_group(device, heads, queries, topk, slots) if queries >= LEAST_QUERIES else 1
