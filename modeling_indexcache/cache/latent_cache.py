"""How MLA latents and index keys live in transformers' own caches, dynamic, static or offloaded.

One row per token, `[c | rope(k)]`, is kept in the cache's `keys`; its `values` are zero wide. Kernels gather whole
rows, and crop, reorder and offload act on them as on any keys. Index keys use the indexer slot of `indexed_attention`
layers, which allocates on first use: shared layers never touch it and hold none.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, StaticIndexedLayer

from ...kernels.norm_rope_linear.cache_slot import CacheSlot
from .growing_cache import append_rows


def append_latents(cache: Cache | None, latents: torch.Tensor, layer_idx: int) -> torch.Tensor:
    """Store the latents of new tokens and return those of all slots.

    Args:
        cache: any transformers cache, or None.
        latents: `[B, S, D]`.
        layer_idx: decoder layer.

    Returns:
        `[B, T, D]`: `T` is the length so far for dynamic caches, the capacity for static ones.
    """
    if cache is None:
        return latents
    if (slot := latent_slot(cache, layer_idx)) is not None:
        return slot.write(latents)
    rows = latents.unsqueeze(1)
    if (layer := _growing_layer(cache, latents, layer_idx)) is not None:
        if not layer.is_initialized:
            layer.lazy_initialization(rows, rows)
        rows = append_rows(layer, "keys", rows)
        layer.values = rows[..., :0]
        return rows.squeeze(1)
    _count_on_device(cache, layer_idx, latents.device)
    rows, _ = cache.update(rows, rows[..., :0], layer_idx)
    return rows.squeeze(1)


def append_index_keys(cache: Cache | None, index_keys: torch.Tensor, layer_idx: int) -> torch.Tensor:
    """Store the index keys `[B, S, D_I]` of new tokens and return those of all slots, `[B, T, D_I]`.

    To be called before `append_latents` of the same layer, which moves an offloaded layer away again.

    Raises:
        ValueError: when the cache has no room for index keys.
    """
    if cache is None:
        return index_keys
    if (slot := index_key_slot(cache, layer_idx)) is not None:
        return slot.write(index_keys)
    _make_room(cache, layer_idx)
    if cache.offloading and index_keys.is_cuda:
        torch.cuda.current_stream(index_keys.device).wait_stream(cache.prefetch_stream)
    if (layer := _growing_layer(cache, index_keys, layer_idx)) is not None:
        if not layer.is_indexer_initialized:
            layer.lazy_initialization_indexer(index_keys)
        return append_rows(layer, "indexer_keys", index_keys)
    return cache.update_indexer(index_keys, layer_idx)


def _make_room(cache: Cache, layer_idx: int) -> None:
    """Let a cache made without a config, which makes its layers at their first use, make some for index keys.

    Raises:
        ValueError: when the cache has no such layer, or none with room for index keys.
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = DynamicIndexedLayer
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    if layer_idx >= len(cache.layers) or not hasattr(cache.layers[layer_idx], "update_indexer"):
        raise ValueError(
            f"layer {layer_idx} of this {type(cache).__name__} of {len(cache.layers)} layers cannot hold index keys: "
            "make the cache with the model's config, as in DynamicCache(config=model.config)"
        )


def latent_slot(cache: Any, layer_idx: int) -> CacheSlot | None:
    """Where a kernel may write the latents of new tokens itself: while a decoding step is recorded."""
    layer = _layer(cache, layer_idx)
    return layer.slot() if hasattr(layer, "slot") else None


def index_key_slot(cache: Any, layer_idx: int) -> CacheSlot | None:
    """The same of index keys."""
    layer = _layer(cache, layer_idx)
    return layer.indexer_slot() if hasattr(layer, "indexer_slot") else None


def _layer(cache: Any, layer_idx: int) -> Any:
    """A layer of a cache; None where there is no cache, or where it makes its layers at their first use."""
    return cache.layers[layer_idx] if cache is not None and layer_idx < len(cache.layers) else None


def _count_on_device(cache: Cache, layer_idx: int, device: torch.device) -> None:
    """Let a new static layer count its rows on `device` from the start.

    It would copy its count there itself, and wait for all that is queued, in every layer of a prefill.
    """
    layer = _layer(cache, layer_idx)
    if cache.offloading or torch.compiler.is_compiling() or type(layer) is not StaticIndexedLayer:
        return
    count = layer.cumulative_length
    if not layer.is_initialized and count.device.type == "cpu" and device.type != "cpu":
        layer.cumulative_length = torch.full_like(count, int(count), device=device)


def _growing_layer(cache: Cache, new: torch.Tensor, layer_idx: int) -> DynamicIndexedLayer | None:
    """The layer when it may be appended to in place: transformers' own dynamic one, resident, without gradient."""
    if cache.offloading or torch.compiler.is_compiling() or (torch.is_grad_enabled() and new.requires_grad):
        return None
    layer = _layer(cache, layer_idx)
    return layer if type(layer) is DynamicIndexedLayer else None
