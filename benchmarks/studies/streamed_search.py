"""Time streamed layers of DeepSeek-V3.2's width on one GPU: reading, computing, memory, and hours for 61 layers.

    python -m indexcache.benchmarks.studies.streamed_search --output FILE.json [--layers 3] [--folder /tmp] [--tiny]

Writes a stack of random block fp8 layers (hidden 7168, 128 heads, 256 experts of 2048; about 12 GB each), opens it as
`--stream` does, and measures, in this order, leaving out what the time limit does not allow:

- bytes a second from the page cache into pinned memory, and from pinned memory to the device, each alone;
- a sweep that reads alone, from the page cache, and one layer read anew from the disk beside the disk's own rate;
- seconds a layer computes over one window, full and shared, by length of the window;
- a sweep with `--windows` windows side by side: seconds, how much of it waited for layers, the GPU's peak.

Hours for a search of 61 layers are `sweeps` times the larger of reading and computing a sweep; how many sweeps and
layer-forwards a search takes is given (`--sweeps`, `--layer-forwards` for one window), from a search's own record.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from indexcache.conversion.convert.families import convert_config, expected_indexer, expected_tensors, load_config
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.kernels.block_fp8.block_fp8_format import scale_grid
from indexcache.modeling_indexcache.forward_plan import ForwardPlan
from indexcache.modeling_indexcache.selection import EVERY_KEY
from indexcache.runs.loading import Placement
from indexcache.runs.streaming.layer_source import LayerSource
from indexcache.runs.streaming.shard_reader import CHUNK_BYTES, READERS
from indexcache.runs.streaming.streamed_forwards import stream_model
from indexcache.runs.versions import stamp

WHOLE_DEPTH = 61
CONFIG = {
    "model_type": "deepseek_v32",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 2.5,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
TINY = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "index_n_heads": 8,
    "index_topk": 64,
    "vocab_size": 512,
}
FILES_A_LAYER, WRITERS = 4, 8


def write_stack(folder: Path, config: dict[str, Any], device: torch.device) -> int:
    """Write the checkpoint, several files at once; its bytes."""
    checked = load_config(convert_config(config, None, None, {}, "benchmark"), "benchmark")
    shapes = expected_tensors(checked)
    for layer in range(config["num_hidden_layers"]):
        shapes |= expected_indexer(checked, layer)
    files: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for number, (name, expected) in enumerate(sorted(shapes.items())):
        layer = name.split(".")[2] if ".layers." in name else "root"
        entries = files.setdefault(f"model-{layer}-{number % FILES_A_LAYER}.safetensors", {})
        shape = expected.shape
        if expected.quantisable and "weights_proj" not in name:
            entries[name] = "F8_E4M3", shape
            entries[name + "_scale_inv"] = "F32", scale_grid(shape[0], shape[1], (128, 128))
        else:
            entries[name] = "BF16", shape
    with ThreadPoolExecutor(WRITERS) as pool:
        sizes = list(pool.map(lambda file: _write(folder / file, files[file], device), files))
    index = {name: file for file, entries in files.items() for name in entries}
    document = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(sizes)


def _write(path: Path, entries: dict[str, tuple[str, tuple[int, ...]]], device: torch.device) -> int:
    header, end = {}, 0
    for name, (kind, shape) in entries.items():
        size = {"F8_E4M3": 1, "BF16": 2, "F32": 4}[kind] * torch.Size(shape).numel()
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (kind, shape) in entries.items():
            file.write(memoryview(_values(name, kind, shape, device).flatten().view(torch.uint8).cpu().numpy()))
    return end


def _values(name: str, kind: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if kind == "F8_E4M3":
        # Any byte below 2 in magnitude: none is NaN.
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device) & 0xBF
    if kind == "F32":
        return torch.full(shape, 0.02, device=device)
    if len(shape) == 1:
        fill = 0.0 if name.endswith("bias") else 1.0
        return torch.full(shape, fill, dtype=torch.bfloat16, device=device)
    return torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02


def read_rate(folder: Path, files: list[str], pinned: bool, most: int = 2**34) -> float:
    """Bytes a second into buffers, by as many threads and in reads as long as the layer source's."""
    jobs = []
    for file in files:
        size = (folder / file).stat().st_size
        jobs += [(file, first, min(CHUNK_BYTES, size - first)) for first in range(0, size, CHUNK_BYTES)]
    jobs = jobs[: max(1, most // CHUNK_BYTES)]
    opened = {file: os.open(folder / file, os.O_RDONLY) for file in files}
    buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(READERS)]

    def read(part: int) -> int:
        view, total = memoryview(buffers[part].numpy()), 0
        for file, first, size in jobs[part::READERS]:
            total += os.preadv(opened[file], [view[:size]], first)
        return total

    begun = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(read, range(READERS)))
    seconds = time.perf_counter() - begun
    for descriptor in opened.values():
        os.close(descriptor)
    return total / seconds


def copy_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory to the device."""
    source = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**30, dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(4):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return 4 * 2**30 / (time.perf_counter() - begun)


def forget(folder: Path, files: list[str]) -> None:
    """Take files out of the page cache, as far as the system does so."""
    for file in files:
        descriptor = os.open(folder / file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def layer_seconds(source: LayerSource, lengths: list[int], deadline: float) -> Iterator[dict[str, Any]]:
    """What one layer takes over one window, full and then shared, by length; the second of two runs counts."""
    decoder: Any = source.model.model
    for layer in source.sweep([1]):
        for length in lengths:
            if time.monotonic() > deadline:
                yield {"length": length, "left_out": "time"}
                continue
            ids = torch.randint(0, source.model.config.vocab_size, (1, length), device=source.device)
            hidden = decoder.embed_tokens(ids)
            found: dict[str, Any] = {"length": length}
            base = ForwardPlan.of(decoder, hidden, keeps_states=True)
            selection = EVERY_KEY
            for kind, letters in (("full", "F" * source.num_layers), ("shared", "FS" + "F" * (source.num_layers - 2))):
                plan = replace(base, letters=letters)
                for _ in range(2):
                    sync(source.device)
                    begun = time.perf_counter()
                    _, made, _ = plan.run(decoder, hidden, selection, layer, layer + 1)
                    sync(source.device)
                    found[f"{kind}_seconds"] = round(time.perf_counter() - begun, 4)
                selection = made
                del made, _
            yield found


@torch.inference_mode()
def whole_sweep(source: LayerSource, windows: int, length: int) -> dict[str, Any]:
    """A sweep with windows side by side, all full."""
    decoder: Any = source.model.model
    shape = (1, length)
    states = [
        (
            decoder.embed_tokens(torch.randint(0, source.model.config.vocab_size, shape, device=source.device)),
            EVERY_KEY,
        )
        for _ in range(windows)
    ]
    plan = replace(ForwardPlan.of(decoder, states[0][0], keeps_states=True), letters="F" * source.num_layers)
    if source.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    waited, bytes_before, begun = source.seconds_waited, source.bytes_read, time.perf_counter()
    for layer in source.sweep():
        for number, (hidden, selection) in enumerate(states):
            states[number] = plan.run(decoder, hidden, selection, layer, layer + 1)[:2]
            del hidden, selection
    sync(source.device)
    seconds = time.perf_counter() - begun
    finite = all(bool(torch.isfinite(hidden).all()) for hidden, _ in states)
    peak = torch.cuda.max_memory_allocated() if source.device.type == "cuda" else None
    return {
        "windows": windows,
        "length": length,
        "seconds": round(seconds, 3),
        "seconds_waited": round(source.seconds_waited - waited, 3),
        "bytes_read": source.bytes_read - bytes_before,
        "finite": finite,
        "peak_gpu_bytes": peak,
    }


def timed_sweep(source: LayerSource, order: list[int] | None = None) -> dict[str, Any]:
    """A sweep that reads alone."""
    before, begun = source.bytes_read, time.perf_counter()
    for _ in source.sweep(order):
        pass
    sync(source.device)
    seconds = time.perf_counter() - begun
    return {"seconds": round(seconds, 3), "bytes_a_second": round((source.bytes_read - before) / seconds)}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it, section by section."""
    deadline = time.monotonic() + arguments.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = {**CONFIG, **(TINY if arguments.tiny else {}), "num_hidden_layers": arguments.layers}
    lengths = [256, 512] if arguments.tiny else [8192, 32768, 65536]
    found: dict[str, Any] = {"layers": arguments.layers, "tiny": arguments.tiny, "device": str(device)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)

    def say(name: str, value: Any) -> None:
        found[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)

    begun = time.perf_counter()
    say("stack_bytes", write_stack(folder, config, device))
    say("write_seconds", round(time.perf_counter() - begun, 2))
    begun = time.perf_counter()
    source = stream_model(open_checkpoint(str(folder)), Placement(device=str(device)))
    say("open_seconds", round(time.perf_counter() - begun, 2))
    say("layer_bytes", source.layer_bytes())
    files = {number: sorted(p.name for p in folder.glob(f"model-{number}-*")) for number in range(arguments.layers)}
    everything = [file for part in files.values() for file in part]
    say("page_cache_bytes_a_second", round(read_rate(folder, everything, device.type == "cuda")))
    if device.type == "cuda":
        say("pinned_to_gpu_bytes_a_second", round(copy_rate(device)))
    timed_sweep(source, [0])  # buffers are made
    say("sweep_that_reads_alone", timed_sweep(source))
    say("layer_over_one_window", list(layer_seconds(source, lengths, deadline - 60)))
    for windows in (1, arguments.windows):
        if time.monotonic() < deadline - 40:
            say(f"sweep_of_{windows}_windows", whole_sweep(source, windows, lengths[-1]))
    if time.monotonic() < deadline - 30:
        # A layer's halves: one read by threads alone, one layer by the source.
        forget(folder, files[0][:1])
        rate = read_rate(folder, files[0][:1], False, 2**31)
        say("disk_bytes_a_second", round(rate))
        if source.layer_bytes() / rate < deadline - time.monotonic():
            forget(folder, files[1])
            say("layer_from_disk", timed_sweep(source, [1]))
    say("reckoned", reckon(found, arguments))
    source.close()
    return found | {"versions": stamp()}


def reckon(found: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Hours of a search of 61 layers, from host memory and from this disk."""
    timed = [entry for entry in found["layer_over_one_window"] if "full_seconds" in entry]
    if not timed:
        return {"left_out": "no layer was timed"}
    layer, read = timed[-1], found["sweep_that_reads_alone"]["seconds"] / arguments.layers
    computing = arguments.layer_forwards * max(layer["full_seconds"], layer["shared_seconds"])
    reads = {"host_memory": read}
    if "layer_from_disk" in found:
        reads["disk"] = found["layer_from_disk"]["seconds"]
    result: dict[str, Any] = {
        "depth": WHOLE_DEPTH,
        "window_length": layer["length"],
        "sweeps": arguments.sweeps,
        "layer_forwards": arguments.layer_forwards,
        "computing_hours": round(computing / 3600, 2),
    }
    for name, seconds in reads.items():
        reading = arguments.sweeps * WHOLE_DEPTH * seconds
        result[f"reading_hours_from_{name}"] = round(reading / 3600, 2)
        # One hides behind the other as far as it is shorter.
        result[f"hours_from_{name}"] = round(max(reading, computing) / 3600, 2)
    return result


def main() -> None:
    """Write the stack, measure, write the result, remove the stack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the stack is written; a temporary folder's place")
    parser.add_argument("--windows", type=int, default=4, help="windows side by side in the last sweep")
    parser.add_argument("--sweeps", type=int, default=WHOLE_DEPTH * 2, help="of a search of 61 layers")
    parser.add_argument("--layer-forwards", type=int, default=WHOLE_DEPTH * 400, help="of a search of 61 layers")
    parser.add_argument("--seconds", type=float, default=220, help="measurements begun after so long are left out")
    parser.add_argument("--tiny", action="store_true", help="small layers, to try the script anywhere")
    arguments = parser.parse_args()
    if arguments.layers < 2:
        parser.error("--layers must be at least 2")
    folder = Path(tempfile.mkdtemp(prefix="streamed_search_", dir=arguments.folder))
    try:
        found = measure(arguments, folder)
    finally:
        shutil.rmtree(folder)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
