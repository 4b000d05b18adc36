"""Describe a DSA or IndexCache checkpoint from its config and headers: pattern, indexers, cache a token."""

from __future__ import annotations

import math
from typing import Any

from ...configuration.share_pattern import SharePattern
from ..convert.families import INDEXCACHE, indexer_layer, layer_of
from ..io.checkpoint import DTYPE_BITS, Checkpoint
from ..io.fp8 import SCALE_SUFFIX
from ..io.open_checkpoint import open_checkpoint
from ..io.sources import Source

_CACHE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


def describe(source: Source) -> dict[str, Any]:
    """All that `indexcache inspect` shows, as JSON-ready values.

    Returns:
        `model_type`, `source_model_type`, sizes (`num_layers`, `parameters`, `bytes`, `shards`, `bytes_by_dtype`), the
        `pattern` with its `groups`, `indexers` (one entry a layer: `type`, `reads` the layer whose selection it uses,
        `bytes` of indexer weights, 0 when absent), `mtp_layers`, and `cache` (bytes a token: `latents`, `index_keys`,
        `index_keys_all_full`, `saved_share`).

    Raises:
        ConversionError: the checkpoint cannot be read, is not whole, or is of an unknown family.
    """
    opened = open_checkpoint(source)
    checkpoint, config = opened.checkpoint, opened.config
    pattern = config.share_pattern
    indexer_bytes = _bytes_by_indexer(checkpoint)
    bits = _CACHE_BITS.get(str(config.dtype).removeprefix("torch."), 16)
    latents = (config.kv_lora_rank + config.qk_rope_head_dim) * len(pattern) * bits // 8
    index_key = config.index_head_dim * bits // 8
    layers = {place[0] for place in map(layer_of, checkpoint.tensors) if place}
    return {
        "location": source.location,
        "model_type": checkpoint.config["model_type"],
        "source_model_type": opened.fields["source_model_type"],
        "is_indexcache": checkpoint.config["model_type"] == INDEXCACHE,
        "num_layers": len(pattern),
        "parameters": _parameters(checkpoint),
        "bytes": checkpoint.nbytes,
        "shards": len(checkpoint.shards),
        "bytes_by_dtype": _bytes_by_dtype(checkpoint),
        "index_topk": config.index_topk,
        "index_n_heads": config.index_n_heads,
        "index_head_dim": config.index_head_dim,
        "pattern": pattern.letters,
        "groups": {str(full): served for full, served in pattern.groups.items()},
        "indexers": [_indexer(layer, pattern, indexer_bytes.get(layer, 0)) for layer in range(len(pattern))],
        "mtp_layers": sorted(layer for layer in layers if layer >= len(pattern)),
        "cache": {
            "bits": bits,
            "latents": latents,
            "index_keys": index_key * pattern.num_full,
            "index_keys_all_full": index_key * len(pattern),
            "saved_share": 1 - (latents + index_key * pattern.num_full) / (latents + index_key * len(pattern)),
        },
    }


def _indexer(layer: int, pattern: SharePattern, nbytes: int) -> dict[str, Any]:
    return {"layer": layer, "type": pattern.indexer_types[layer], "reads": pattern.source_of(layer), "bytes": nbytes}


def _bytes_by_indexer(checkpoint: Checkpoint) -> dict[int, int]:
    found: dict[int, int] = {}
    for name, info in checkpoint.tensors.items():
        layer = indexer_layer(name)
        if layer is not None:
            found[layer] = found.get(layer, 0) + info.nbytes
    return found


def _bytes_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    found: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        found[info.dtype] = found.get(info.dtype, 0) + info.nbytes
    return dict(sorted(found.items(), key=lambda item: (-item[1], DTYPE_BITS[item[0]])))


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(info.shape) for name, info in checkpoint.tensors.items() if not name.endswith(SCALE_SUFFIX))
