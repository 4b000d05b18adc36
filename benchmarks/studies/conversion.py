"""Time a conversion against `cp -r` of the same files, and measure its peak memory.

    python -m indexcache.benchmarks.studies.conversion [--gigabytes 6] [--folder /tmp] [--output FILE.json]

Builds a checkpoint in the layout of a release (fp8 with 128 x 128 block scales beside bf16, one tensor an expert, a
layer over two to three shards), then runs, each in a process of its own and in turn: `cp -r`, the conversion with
unchanged shards linked, with every shard copied and, with --cast, with all weights dequantised to bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.convert.families import convert_config, expected_indexer, expected_tensors, load_config
from indexcache.conversion.io.checkpoint import read_checkpoint
from indexcache.conversion.io.fp8 import SCALE_SUFFIX
from indexcache.conversion.io.sources import FolderSource
from indexcache.kernels.block_fp8.block_fp8_format import scale_grid
from indexcache.runs.versions import stamp

LAYERS, KEEP, SHARDS = 12, "1/4", 36
CONFIG = {
    "model_type": "deepseek_v32",
    "num_hidden_layers": LAYERS,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": 1024,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1024,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "vocab_size": 64000,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}

# Run in the measured process, whose peak is reset after the imports (/proc/self/clear_refs, see proc(5)).
_CONVERT = """
import json, sys, time
from pathlib import Path
from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.io.sources import FolderSource
from indexcache.conversion.convert.convert import ConvertOptions, convert

source, output, pattern, options = sys.argv[1:]
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

Path("/proc/self/clear_refs").write_text("5")
before = peak()
started = time.perf_counter()
done = convert(FolderSource(source), Path(output), ConvertOptions(SharePattern(pattern), **json.loads(options)))
seconds = time.perf_counter() - started
print(json.dumps({
    "seconds": seconds,
    "imports_rss_bytes": before,
    "peak_rss_bytes": peak(),
    "shards": {how: list(done.how.values()).count(how) for how in sorted(set(done.how.values()))},
}))
"""


def build_release(folder: Path, gigabytes: float) -> dict[str, object]:
    """Write the checkpoint, shard by shard; returns its config."""
    shapes = {}
    for experts in range(16, 513, 8):
        config = {**CONFIG, "n_routed_experts": experts}
        checked = load_config(convert_config(config, None, None, {}, "benchmark"), "benchmark")
        shapes = expected_tensors(checked)
        for layer in range(LAYERS):
            shapes |= expected_indexer(checked, layer)
        if sum(_nbytes(shape.shape, shape.quantisable) for shape in shapes.values()) >= gigabytes * 1e9:
            break
    ordered = sorted(shapes, key=_release_order)
    total = sum(_nbytes(shapes[name].shape, shapes[name].quantisable) for name in ordered)
    folder.mkdir(parents=True)
    noise = torch.randint(0, 256, (1 << 26,), dtype=torch.uint8)
    weight_map, part, filled, number, shards = {}, {}, 0, 1, min(SHARDS, len(ordered) // 8)
    for position, name in enumerate(ordered):
        shape, quantisable = shapes[name].shape, shapes[name].quantisable
        for key, tensor in _tensors(name, shape, quantisable, noise, position).items():
            part[key] = tensor
            filled += tensor.nbytes
        if filled >= total * number / shards or position == len(ordered) - 1:
            file = f"model-{number:05d}-of-{shards:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
            part, number = {}, number + 1
    index = {"metadata": {"total_size": filled}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return config


def _release_order(name: str) -> tuple[int, int, str]:
    """Embeddings, then layer by layer with attention and indexer before the experts, then the head."""
    if ".layers." not in name:
        return (-1 if "embed" in name else LAYERS, 0, name)
    return (int(name.split(".")[2]), int(".mlp." in name), name)


def _is_fp8(shape: tuple[int, ...], quantisable: bool) -> bool:
    return quantisable and shape[0] >= 128


def _nbytes(shape: tuple[int, ...], quantisable: bool) -> int:
    elements = 1
    for side in shape:
        elements *= side
    return elements if _is_fp8(shape, quantisable) else 2 * elements


def _tensors(
    name: str, shape: tuple[int, ...], quantisable: bool, noise: torch.Tensor, position: int
) -> dict[str, torch.Tensor]:
    """A tensor of noise, and the scales of an fp8 one."""
    size = _nbytes(shape, quantisable)
    start = position * 4096 % 65536
    raw = noise.repeat(-(-(size + start) // len(noise)))[start : start + size].clone()
    if not _is_fp8(shape, quantisable):
        raw[1::2] &= 0xBF  # keep bf16 finite
        return {name: raw.view(torch.bfloat16).reshape(shape)}
    raw[(raw & 0x7F) == 0x7F] = 0
    grid = scale_grid(shape[0], shape[1], (128, 128))
    return {name: raw.view(torch.float8_e4m3fn).reshape(shape), name + SCALE_SUFFIX: torch.rand(grid) + 0.5}


def measure_copy(source: Path, output: Path) -> float:
    """Seconds of `cp -r`."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(output)], check=True)
    return time.perf_counter() - started


def measure_conversion(source: Path, output: Path, pattern: str, options: dict[str, object]) -> dict[str, object]:
    """Seconds, peak memory and what became of the shards, from a process of its own."""
    command = [sys.executable, "-c", _CONVERT, str(source), str(output), pattern, json.dumps(options)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    """Build, measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cast", action="store_true", help="also time dequantising to bfloat16")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "conversion.json")
    arguments = parser.parse_args()
    pattern = SharePattern.uniform(LAYERS, KEEP).letters
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        source, output = Path(scratch) / "source", Path(scratch) / "output"
        build_release(source, arguments.gigabytes)
        checkpoint = read_checkpoint(FolderSource(source))
        largest = max(shard.size for shard in checkpoint.shards.values())
        runs: dict[str, list[dict[str, object]]] = {}
        cases: dict[str, dict[str, object] | None] = {
            "cp -r": None,
            "convert": {},
            "convert --copy": {"copy": True},
        }
        if arguments.cast:
            cases["convert --dtype bfloat16"] = {"dtype": "bfloat16"}
        for _ in range(arguments.rounds):
            for name, options in cases.items():
                os.sync()  # no case pays for the pages that another left unwritten
                if options is None:
                    found: dict[str, object] = {"seconds": measure_copy(source, output)}
                else:
                    found = measure_conversion(source, output, pattern, options)
                runs.setdefault(name, []).append(found)
                print(name, found, flush=True)
                shutil.rmtree(output)
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        copied = min(float(str(run["seconds"])) for run in runs["cp -r"])
        results = {
            "command": f"python -m indexcache.benchmarks.studies.conversion --gigabytes {arguments.gigabytes:g}",
            "machine": {**stamp(), "memory_gigabytes": round(pages / 1e9)},
            "checkpoint": {
                "bytes": checkpoint.nbytes,
                "tensors": len(checkpoint.tensors),
                "shards": len(checkpoint.shards),
                "largest_shard_bytes": largest,
                "pattern": pattern,
            },
            "runs": runs,
            "speed_relative_to_cp": {
                name: round(copied / min(float(str(run["seconds"])) for run in found), 2)
                for name, found in runs.items()
            },
            "peak_rss_above_imports_bytes": {
                name: max(int(str(run["peak_rss_bytes"])) - int(str(run["imports_rss_bytes"])) for run in found)
                for name, found in runs.items()
                if name != "cp -r"
            },
            "peak_rss_limit_bytes": largest + 300_000_000,
        }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["speed_relative_to_cp"]), json.dumps(results["peak_rss_above_imports_bytes"]))


if __name__ == "__main__":
    main()
