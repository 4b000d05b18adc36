"""How MLA latents and index keys live in transformers' own caches, dynamic, static or offloaded.

One row a token, `[c | rope(k)]`, stands in the cache's `keys`; its `values` are zero wide. Kernels gather whole rows,
and crop, reorder and offload act on them as on any keys. Index keys use the indexer slot of `indexed_attention`
layers, which allocates on first use: shared layers never touch it and hold none.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache


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
    rows = latents.unsqueeze(1)
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
    if layer_idx < len(cache.layers) and not hasattr(cache.layers[layer_idx], "update_indexer"):
        raise ValueError(
            f"layer {layer_idx} of this {type(cache).__name__} cannot hold index keys: make the cache with the "
            "model's config, as in DynamicCache(config=model.config)"
        )
    if cache.offloading and index_keys.is_cuda:
        torch.cuda.current_stream(index_keys.device).wait_stream(cache.prefetch_stream)
    return cache.update_indexer(index_keys, layer_idx)
