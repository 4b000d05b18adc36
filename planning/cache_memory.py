"""Bytes of the cache: latents of every layer, and index keys of full layers alone."""

from __future__ import annotations

from ..configuration.configuration_indexcache import IndexCacheConfig
from ..conversion.io.checkpoint import DTYPE_BITS
from ..modeling_indexcache.cache.growing_cache import LEAST_ROOM

CACHES = ("static", "dynamic")


def cache_rows(way: str, length: int) -> int:
    """Rows of a layer of a cache that has come to hold `length` tokens, the last ones decoded one by one.

    A static cache was made for so many. A dynamic one takes a buffer with room for an eighth more at the first token
    that is decoded, here the last of `length`.
    """
    if way == "static":
        return length
    return length + max(LEAST_ROOM, (length - 1) // 8)


def layer_cache_bytes(config: IndexCacheConfig, layer: int, batch: int, rows: int, dtype: str) -> tuple[int, int]:
    """Bytes of a layer's latents and of its index keys, none where the layer is shared."""
    cells = batch * rows * DTYPE_BITS[dtype]
    has_keys = config.share_pattern.is_full(layer)
    latents = cells * (config.kv_lora_rank + config.qk_rope_head_dim) // 8
    return latents, (cells * config.index_head_dim // 8 if has_keys else 0)
