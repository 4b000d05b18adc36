"""Appending to a dynamic cache in place: rows are written behind the last ones instead of copying all of them.

transformers' dynamic layers concatenate at every step, which moves the whole cache for each token. Here a layer's
tensor is a view of a longer buffer. Rows that were handed out are never written again: a layer that was cropped,
reordered, copied or moved gets a new buffer at its next append.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# A new buffer has room for an eighth more rows, and at least for so many.
LEAST_ROOM = 256
_ATTRIBUTE = "_indexcache_buffers"


@dataclass
class Buffer:
    """Storage of one layer's tensor: `owner` is the layer's id, `filled` the rows handed out."""

    rows: torch.Tensor
    owner: int
    filled: int


def append_rows(layer: Any, name: str, new: torch.Tensor) -> torch.Tensor:
    """Append `new` to the tensor that `layer` keeps under `name`, along the second dimension from the end.

    Args:
        layer: a dynamic cache layer.
        name: attribute of the layer; None or an empty tensor there means no rows so far.
        new: `[..., S, D]`.

    Returns:
        `[..., n + S, D]`, which the layer now keeps. The first append keeps `new` itself, without a copy.
    """
    old = getattr(layer, name)
    if old is None or old.numel() == 0:
        setattr(layer, name, new)
        return new
    length, total = old.shape[-2], old.shape[-2] + new.shape[-2]
    buffer = buffer_of(layer, name, old, total)
    if buffer is None:
        room = max(LEAST_ROOM, length // 8)
        rows = old.new_empty(*old.shape[:-2], total + room, old.shape[-1])
        rows[..., :length, :] = old
        # A recorded step reads all of it, and a key of weight 0 must not be NaN.
        rows[..., total:, :] = 0
        buffer = Buffer(rows, id(layer), length)
        vars(layer).setdefault(_ATTRIBUTE, {})[name] = buffer
    buffer.rows[..., length:total, :] = new
    buffer.filled = total
    kept = buffer.rows[..., :total, :]
    setattr(layer, name, kept)
    return kept


def buffer_of(layer: Any, name: str, old: torch.Tensor, total: int) -> Buffer | None:
    """The buffer whose first rows are `old`, all of them handed out by this layer, with room for `total`; or None."""
    buffer = vars(layer).get(_ATTRIBUTE, {}).get(name)
    if (
        buffer is not None
        and buffer.owner == id(layer)
        and buffer.filled == old.shape[-2]
        and total <= buffer.rows.shape[-2]
        and old.data_ptr() == buffer.rows.data_ptr()
        and (torch.is_inference_mode_enabled() or not buffer.rows.is_inference())
        and old.device == buffer.rows.device
        and old.dtype == buffer.rows.dtype
        and old.shape[:-2] == buffer.rows.shape[:-2]
        and old.shape[-1] == buffer.rows.shape[-1]
    ):
        return buffer
    return None
