"""Releases in full size whose shards are headers and holes: real names, shapes, dtypes and sizes, no weights.

    python tests/testing/sparse_releases.py DeepSeek-V3.2 FOLDER

A shard's file is as long as the release's, and takes the room of its header on disk; what is read of its weights are
zeros. So everything that reads headers alone runs on it as on the release, and copying or hashing takes as long.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from testing.checkpoints import stored_shapes, stored_wide
from testing.released_configs import RELEASED

from indexcache.configuration.share_pattern import SharePattern

# Shards of the releases.
SHARDS = {"DeepSeek-V3.2-Exp": 163, "DeepSeek-V3.2": 163, "GLM-5": 282, "GLM-5.1": 282, "GLM-5.2": 282, "GLM-5.3": 141}
_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def release_config(name, **fields):
    """A release's config.json, with other sizes if asked for; shared layers stay on the release's schedule."""
    config = {**RELEASED[name], **fields}
    if config.get("index_topk_freq"):
        freq, offset = config["index_topk_freq"], config["index_skip_topk_offset"]
        config["indexer_types"] = SharePattern.from_frequency(config["num_hidden_layers"], freq, offset).indexer_types
    return config


def release_tensors(config):
    """Dtype and shape by name, in the order of the release, with a layer for multi-token prediction."""
    types = config.get("indexer_types", ["full"] * config["num_hidden_layers"])
    lacking = [layer for layer, kind in enumerate(types) if kind == "shared"]
    shapes = stored_shapes(config, mtp=config["num_nextn_predict_layers"], lacking=lacking)
    behind = f"model.layers.{config['num_hidden_layers']}.embed_tokens.weight"
    shapes[behind] = (config["vocab_size"], config["hidden_size"])
    quantisation = config.get("quantization_config")
    found = {}
    for name, shape in shapes.items():
        if name.endswith("e_score_correction_bias") or ("k_norm" in name and config["model_type"] == "deepseek_v32"):
            found[name] = "F32", shape
        elif quantisation is None or stored_wide(name):
            found[name] = "BF16", shape
        else:
            grid = [-(-side // block) for side, block in zip(shape, quantisation["weight_block_size"])]
            found[name] = "F8_E4M3", shape
            found[f"{name}_scale_inv"] = "F32", tuple(grid)
    return found


def total_bytes(tensors):
    """Bytes of what `release_tensors` returns."""
    return sum(math.prod(shape) * _BYTES[dtype] for dtype, shape in tensors.values())


def write_release(folder, name, shards=None, **fields):
    """Write config, index and sparse shards of about equal size.

    Args:
        folder: made if it is not there.
        name: of the release, a key of `SHARDS`.
        shards: in place of the release's number.
        **fields: of the config, in place of the release's.

    Returns:
        The folder, and the bytes of all tensors.
    """
    folder, shards = Path(folder), shards or SHARDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    config = release_config(name, **fields)
    tensors = release_tensors(config)
    total = total_bytes(tensors)
    headers, ends = [{} for _ in range(shards)], [0] * shards
    filled, weight_map = 0, {}
    for tensor, (dtype, shape) in tensors.items():
        shard = min(filled * shards // total, shards - 1)
        size = math.prod(shape) * _BYTES[dtype]
        offsets = [ends[shard], ends[shard] + size]
        headers[shard][tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        ends[shard] = offsets[1]
        filled += size
        weight_map[tensor] = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
    for shard, (header, end) in enumerate(zip(headers, ends)):
        raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors", "wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder, total


def main():
    """Write a release."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("name", choices=SHARDS)
    arguments.add_argument("folder", type=Path)
    chosen = arguments.parse_args()
    folder, total = write_release(chosen.folder, chosen.name)
    print(f"{folder}: {total:,} bytes of tensors in {SHARDS[chosen.name]} sparse shards")


if __name__ == "__main__":
    main()
