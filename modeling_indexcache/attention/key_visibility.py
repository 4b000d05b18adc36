"""Which keys a query may see, kept as two small tensors instead of an `[S, T]` mask.

Legend: B batch, S queries, T key slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from ...kernels.lightning_indexer.lightning_indexer import visible_keys

# Lists of all keys are at least so wide.
LEAST_LISTED = 64


@dataclass(frozen=True)
class KeyVisibility:
    """A key is visible when its slot lies between `key_start` and the query's slot and `key_mask` allows it.

    Attributes:
        query_start: int64 tensor `[]`, the cache slot of the first query.
        key_mask: bool `[B, T]` (False: padding), `[B, S, T]` for a mask of each query's own, or None.
        key_start: int32 `[B, S]`, the slot where each query's document begins in a packed sequence, or None.
        is_triangle: there is no cache, no padding and one document: query i sees keys 0 .. i.
    """

    query_start: torch.Tensor
    key_mask: torch.Tensor | None
    key_start: torch.Tensor | None = None
    is_triangle: bool = False
    #: What `every_listed_index` made, which every layer of a forward asks for. FSDP makes the object anew from its
    #: fields, this one too.
    _listed: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        attention_mask: torch.Tensor | dict | None,
        cache: Cache | None,
        num_queries: int,
        device: torch.device,
        key_start: torch.Tensor | None = None,
    ) -> KeyVisibility:
        """Read what `forward` was given.

        Args:
            attention_mask: `[B, >= past + S]` (1 or True: no padding), a prepared 4-D mask `[B, 1, S, T]` (bool, or
                additive with 0 where visible), or a dict of such by layer type, as `generate` prepares.
            cache: the cache before this forward, or None.
            num_queries: S.
            device: where the hidden states are.
            key_start: see `packed_key_start`.
        """
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, torch.Tensor):
            # A copy: static caches count on in place, layer by layer.
            query_start = past.to(device=device, dtype=torch.int64, copy=True)
        else:
            # Filled there: a copy from the host would wait for the device.
            query_start = torch.full((), past, dtype=torch.int64, device=device)
        if isinstance(attention_mask, dict):
            attention_mask = next(iter(attention_mask.values()), None)
        if attention_mask is None:
            return cls(query_start, None, key_start, is_triangle=cache is None and key_start is None)
        if attention_mask.dim() == 4:
            seen = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0
            return cls(query_start, seen)
        if attention_mask.dim() != 2:
            raise ValueError(
                "attention_mask must be [batch, tokens], or [batch, 1, queries, keys], "
                f"got {tuple(attention_mask.shape)}"
            )
        key_mask = attention_mask.to(torch.bool)
        # One look (a synchronisation on a GPU) per prefill saves every layer the mask; decoding never waits for it.
        if not torch.compiler.is_compiling() and (device.type == "cpu" or num_queries > 1) and bool(key_mask.all()):
            return cls(query_start, None, is_triangle=cache is None)
        return cls(query_start, key_mask)

    def to(self, device: torch.device, non_blocking: bool = False) -> KeyVisibility:
        """The same on `device`; accelerate's hooks move arguments by a method of this name."""
        start = self.query_start.to(device, non_blocking=non_blocking)
        if start is self.query_start:
            return self
        given = self.key_mask, self.key_start
        mask, key_start = (None if t is None else t.to(device, non_blocking=non_blocking) for t in given)
        return KeyVisibility(start, mask, key_start, is_triangle=self.is_triangle)

    def for_keys(self, num_keys: int) -> KeyVisibility:
        """The same, with `key_mask` cut or filled up to `num_keys` slots (later slots are hidden by causality)."""
        if self.key_mask is None or self.key_mask.shape[-1] == num_keys:
            return self
        missing = num_keys - self.key_mask.shape[-1]
        fitted = self.key_mask[..., :num_keys] if missing < 0 else F.pad(self.key_mask, (0, missing), value=True)
        return KeyVisibility(self.query_start, fitted, self.key_start)

    def of_queries(self, first: int, last: int) -> KeyVisibility:
        """The same for the queries `first` to `last` alone."""
        mask = self.key_mask
        if mask is not None and mask.dim() == 3:
            mask = mask[:, first:last]
        key_start = None if self.key_start is None else self.key_start[:, first:last].contiguous()
        return KeyVisibility(self.query_start + first, mask, key_start)

    def limits(self) -> dict[str, Any]:
        """The tensors by the names under which kernels take them."""
        return {"query_start": self.query_start, "key_start": self.key_start, "key_mask": self.key_mask}

    def rows(self, first: int, last: int, num_keys: int) -> torch.Tensor:
        """The `[B or 1, last - first, T]` bool mask of queries `first` to `last`."""
        part = self.of_queries(first, last)
        return visible_keys(part.query_start, last - first, num_keys, part.key_mask, part.key_start)

    def every_index(self, num_queries: int, num_keys: int, batch: int) -> torch.Tensor:
        """The selection when nothing need be left out: int32 `[B, S, T]`, visible slots ascending, then -1."""
        seen = self.rows(0, num_queries, num_keys).expand(batch, -1, -1)
        slots = torch.arange(num_keys, device=seen.device).expand_as(seen)
        ordered = slots.masked_fill(~seen, num_keys).sort(dim=-1).values
        return ordered.masked_fill(ordered == num_keys, -1).to(torch.int32)

    def every_listed_index(self, num_queries: int, num_keys: int, batch: int) -> torch.Tensor:
        """As `every_index`, made once for all layers and as wide as `listed_width`: int32 `[B, S, width]`."""
        key = (num_queries, num_keys, batch)
        if key not in self._listed:
            indices = self.for_keys(num_keys).every_index(num_queries, num_keys, batch)
            self._listed[key] = F.pad(indices, (0, listed_width(num_keys) - num_keys), value=-1)
        return self._listed[key]


def listed_width(num_keys: int) -> int:
    """Width of lists that hold so many keys: of few sizes, since kernels are compiled for each."""
    return max(LEAST_LISTED, 1 << (num_keys - 1).bit_length())


def packed_key_start(
    position_ids: torch.Tensor | None, cu_seq_lens: torch.Tensor | None, batch: int, num_queries: int
) -> torch.Tensor | None:
    """Where each query's document begins, when several are packed in one sequence: int32 `[B, S]`, or None.

    Args:
        position_ids: `[B or 1, S]`; a position that does not follow the one before it begins a document, as
            transformers' packing collators mean it.
        cu_seq_lens: `[documents + 1]`, the slots where documents begin, and S; for a batch of one. Used in place of
            `position_ids`, and without waiting for the device.
        batch: B.
        num_queries: S.

    Raises:
        ValueError: `cu_seq_lens` for a batch of several rows.
    """
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, and this batch has {batch}: give position_ids")
        slots = torch.arange(num_queries, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
        document = torch.searchsorted(cu_seq_lens, slots, right=True) - 1
        return cu_seq_lens[document].to(torch.int32).unsqueeze(0)
    # Whether documents are packed must be known before the graph is made, so a compiled forward reads cu_seq_lens.
    if position_ids is None or num_queries < 2 or torch.compiler.is_compiling():
        return None
    begins = F.pad(position_ids[..., 1:] != position_ids[..., :-1] + 1, (1, 0))
    if not bool(begins.any()):
        return None
    slots = torch.arange(num_queries, device=position_ids.device).expand_as(begins)
    return slots.where(begins, 0).cummax(-1).values.to(torch.int32).expand(batch, -1)


def mask_at_capacity(attention_mask: torch.Tensor | None, cache: Cache | None) -> torch.Tensor | None:
    """A 2-D mask `[B, tokens]` at a static cache's full length, `[B, capacity]`; anything else as it is.

    Its shape stays the same from step to step, so that a compiled decoding step is compiled once.
    """
    if attention_mask is None or attention_mask.dim() != 2 or cache is None:
        return attention_mask
    missing = cache.get_max_length() - attention_mask.shape[-1]
    return F.pad(attention_mask.to(torch.bool), (0, max(0, missing)), value=True)
