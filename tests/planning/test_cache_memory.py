"""Bytes of the cache that a plan reckons with are those of transformers' caches once a model has filled them."""

import pytest
import torch
from testing.tiny_models import SIZES, tiny_model
from transformers import DynamicCache, StaticCache

from indexcache.planning.cache_memory import CACHES, cache_rows, layer_cache_bytes

BATCH = 2


def held(layer):
    """Bytes of storage behind a layer's tensors: latents, index keys."""
    keys, index_keys = layer.keys, getattr(layer, "indexer_keys", None)
    assert layer.values.shape[-1] == 0
    return tuple(0 if tensor is None else tensor.untyped_storage().nbytes() for tensor in (keys, index_keys))


@torch.no_grad()
def filled(model, way, length):
    """A cache that ends up with `length` tokens, the last one decoded."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length) if way == "static" else DynamicCache(config=config)
    ids = torch.arange(BATCH * length).view(BATCH, length) % SIZES["vocab_size"]
    model(ids[:, :-1], past_key_values=cache)
    model(ids[:, -1:], past_key_values=cache)
    return cache


@pytest.mark.parametrize("length", [40, 3000], ids=["short", "long"])
@pytest.mark.parametrize("way", CACHES)
@pytest.mark.parametrize(
    "shape",
    [
        {"index_share_pattern": "FSFS"},
        {"index_share_pattern": "FFFF", "indexer_rope_interleave": True, "index_head_dim": 32},
        {"index_share_pattern": "FSSS", "indexer_fp8": True},
        {"index_share_pattern": "FSSF", "kv_lora_rank": 40},
    ],
    ids=["half", "all F", "e4m3 indexers", "wide latents"],
)
def test_cache_bytes_are_those_of_the_cache_s_tensors(shape, way, length):
    model = tiny_model(**{"max_position_embeddings": 4096, **shape})
    cache, config = filled(model, way, length), model.config
    rows = cache_rows(way, length)
    planned = [layer_cache_bytes(config, layer, BATCH, rows, "F32") for layer in range(4)]
    assert planned == [held(layer) for layer in cache.layers]
    has_keys = [index_keys > 0 for _, index_keys in planned]
    assert has_keys == [letter == "F" for letter in config.index_share_pattern]


def test_half_the_bits_are_half_the_bytes():
    config = tiny_model().config
    assert layer_cache_bytes(config, 0, 1, 10, "F32") == tuple(
        2 * b for b in layer_cache_bytes(config, 0, 1, 10, "BF16")
    )
