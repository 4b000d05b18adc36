"""Measure what a streamed search of a DeepSeek-V3.2-wide model takes on one GPU.

    python -m indexcache.benchmarks.studies.streamed_search [--layers 3] [--tokens 65536] [--passes 2]
        [--folder /tmp] [--output FILE.json] [--tiny]

Writes a stack of layers as wide as V3.2's in block fp8 (random values made on the GPU, about 11.5 GB a layer with
experts), sweeps through it with nothing to run (from the disk, and again from what the system keeps of it in memory),
then with windows, and reckons hours for the default search of 61 layers from the parts. `--tiny` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from indexcache.configuration.share_pattern import FULL, SHARED, SharePattern
from indexcache.conversion.convert.families import convert_config, expected_indexer, expected_tensors, load_config
from indexcache.conversion.io.fp8 import SCALE_SUFFIX
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.kernels.block_fp8.block_fp8_format import scale_grid
from indexcache.runs.streaming.layer_source import LayerSource
from indexcache.runs.streaming.sweep import Sweeper
from indexcache.runs.versions import stamp

LAYERS_OF_V3_2, BLOCK = 61, (128, 128)
# A default search of 16 windows: sweeps a step of the path and beside it, as the demo's 12 layers took them
# (docs/streaming.md), and the steps from 61 full layers to an eighth of them.
SWEEPS_A_STEP, STEPS, OTHER_SWEEPS = 2, 53, 40
WIDE: dict[str, Any] = {
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 0,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "vocab_size": 4096,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 2.5,
    "torch_dtype": "bfloat16",
}
TINY = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "n_routed_experts": 16,
    "index_n_heads": 8,
    "index_topk": 64,
}


def write_stack(folder: Path, layers: int, sizes: dict[str, Any], device: str) -> int:
    """Write a checkpoint of random weights, a shard a layer; its bytes."""
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
    fields = {
        **WIDE,
        **sizes,
        "num_hidden_layers": layers,
        "quantization_config": json.loads(json.dumps(quantisation)),
    }
    (folder / "config.json").write_text(json.dumps(fields))
    config = load_config(convert_config(fields, SharePattern.all_full(layers), None, {}, "stack"), "stack")
    expected = expected_tensors(config)
    for layer in range(layers):
        expected |= expected_indexer(config, layer)
    shards: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {}
    for name, tensor in expected.items():
        place = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shard = shards.setdefault(f"model-{place}.safetensors", {})
        is_fp8 = len(tensor.shape) == 2 and not any(
            part in name for part in ("embed", "lm_head", "gate.weight", "weights_proj")
        )
        exact = name.endswith("e_score_correction_bias")
        shard[name] = (tuple(tensor.shape), "F8_E4M3" if is_fp8 else "F32" if exact else "BF16")
        if is_fp8:
            shard[name + SCALE_SUFFIX] = (scale_grid(tensor.shape[0], tensor.shape[1], BLOCK), "F32")
    written = sum(_write_shard(folder / file, tensors, device) for file, tensors in shards.items())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return written


def _write_shard(path: Path, tensors: dict[str, tuple[tuple[int, ...], str]], device: str) -> int:
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    header, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + torch.Size(shape).numel() * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in tensors.items():
            file.write(_values(name, shape, dtype, device).cpu().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
        # Read from the disk the first time.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return 8 + len(text) + end


def _values(name: str, shape: tuple[int, ...], dtype: str, device: str) -> torch.Tensor:
    if dtype == "F8_E4M3":
        # Any sign and mantissa with exponents of 2**-7 to 2**0; no NaN among them.
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device).bitwise_and_(0xBF)
    if name.endswith(SCALE_SUFFIX):
        return torch.full(shape, 0.02, device=device)
    value = torch.ones(shape, device=device) if "norm" in name else torch.randn(shape, device=device) * 0.02
    return value.to({"BF16": torch.bfloat16, "F32": torch.float32}[dtype])


def swept(source: LayerSource, work: Any = None) -> dict[str, float]:
    """Seconds, bytes and rate of one sweep, with `work` or with nothing to run."""
    before, begun = replace(source.reading), time.monotonic()
    if work is None:
        for _ in source.layers():
            pass
    else:
        work()
    seconds = time.monotonic() - begun
    nbytes = source.reading.nbytes - before.nbytes
    return {
        "seconds": seconds,
        "bytes": nbytes,
        "gigabytes_per_second": nbytes / seconds / 1e9,
        "seconds_waited": source.reading.seconds_waited - before.seconds_waited,
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--passes", type=int, default=2, help="patterns in the sweep that is timed with work")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = 256 if arguments.tiny else arguments.tokens
    folder = Path(tempfile.mkdtemp(prefix="streamed_search_", dir=arguments.folder))
    found: dict[str, Any] = {"layers": arguments.layers, "tokens": tokens, "device": device}
    try:
        begun = time.monotonic()
        found["bytes"] = write_stack(folder, arguments.layers, TINY if arguments.tiny else {}, device)
        found["seconds_to_write"] = time.monotonic() - begun
        print(json.dumps(found), flush=True)
        source = LayerSource(open_checkpoint(folder), torch.bfloat16 if device == "cuda" else torch.float32, device)
        for name in ("from_disk", "from_memory", "from_memory_again"):
            found[name] = swept(source)
            print(name, found[name], flush=True)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(0, WIDE["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
        sweeper = Sweeper(source, [ids], keeps_states=True, held_on=torch.device("cpu") if device == "cuda" else None)
        patterns = [FULL + f"{number:0{arguments.layers - 1}b}".replace("0", FULL).replace("1", SHARED)
                    for number in range(arguments.passes)] if arguments.layers > 1 else [FULL]  # fmt: skip
        passes = [(0, pattern) for pattern in patterns]
        for name in ("with_work_first", "with_work"):
            before = sweeper.layer_forwards
            found[name] = swept(source, lambda: [None for _ in sweeper.run(passes)])
            found[name]["layer_forwards"] = sweeper.layer_forwards - before
            print(name, found[name], flush=True)
        if device == "cuda":
            found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        source.close()
        found["reckoned"] = reckoned(found, arguments.layers)
        print("reckoned", found["reckoned"])
    finally:
        shutil.rmtree(folder)
    found["versions"] = stamp()
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1))


def reckoned(found: dict[str, Any], layers: int) -> dict[str, float]:
    """Hours of the reading alone for 61 layers' default search, and seconds of work a layer-forward."""
    work = found["with_work"]
    read = found["from_memory_again"]["seconds"] / layers
    sweeps = SWEEPS_A_STEP * STEPS + OTHER_SWEEPS
    return {
        "seconds_to_read_a_layer": read,
        "seconds_to_read_a_layer_from_disk": found["from_disk"]["seconds"] / layers,
        # Reading is hidden behind work where work is longer: then this is the work's, else the reading's.
        "seconds_a_layer_forward": work["seconds"] / work["layer_forwards"],
        "sweeps": sweeps,
        "hours_of_reading_from_memory": sweeps * LAYERS_OF_V3_2 * read / 3600,
        "hours_of_reading_from_disk": sweeps * found["from_disk"]["seconds"] / layers * LAYERS_OF_V3_2 / 3600,
    }


if __name__ == "__main__":
    main()
