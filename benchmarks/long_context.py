"""Prefill and decode of the "30B shape" on one GPU by context length and pattern, with memory and neighbour overlap.

    python -m indexcache.benchmarks.long_context --lengths 10000 60000 120000 200000 --output results.json

The shape is GLM-4.7-Flash with an indexer of 32 heads x 128 (the paper's 30B model, whose indexer it does not give),
random weights. `--input drift` feeds embeddings that drift slowly, so that neighbouring queries select similar keys as
in trained models; `--input random` feeds random tokens. The overlap that results is measured and reported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from .. import IndexCacheConfig, IndexCacheForCausalLM

# The paper's searched patterns of its 30B model (appendix B).
PATTERNS = {
    "all full": "F" * 47,
    "1/2": "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF",
    "1/4": "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS",
    "1/8": "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS",
}
SHAPE: dict[str, Any] = dict(
    vocab_size=154880,
    hidden_size=2048,
    intermediate_size=10240,
    moe_intermediate_size=1536,
    num_hidden_layers=47,
    num_attention_heads=20,
    num_key_value_heads=20,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.8,
    kv_lora_rank=512,
    q_lora_rank=768,
    qk_rope_head_dim=64,
    qk_nope_head_dim=192,
    v_head_dim=256,
    first_k_dense_replace=1,
    index_topk=2048,
    index_n_heads=32,
    index_head_dim=128,
    indexer_rope_interleave=True,
    max_position_embeddings=1048576,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 8000000.0},
)


def random_model(experts: int, device: str = "cuda", layers: int = 47) -> IndexCacheForCausalLM:
    """The shape with random bf16 weights and all indexers, made on the device."""
    torch.manual_seed(0)
    config = IndexCacheConfig(**{**SHAPE, "n_routed_experts": experts, "num_hidden_layers": layers})
    with torch.device(device):
        return IndexCacheForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def drifting_embeddings(model: IndexCacheForCausalLM, length: int, step: float = 0.03) -> torch.Tensor:
    """`[1, length, hidden_size]`: token embeddings' size, each a small step away from the one before."""
    generator = torch.Generator(device=model.device).manual_seed(1)
    width = model.config.hidden_size
    noise = torch.randn(length, width, device=model.device, generator=generator)
    keep = (1 - step**2) ** 0.5
    block = 64
    walk = torch.empty_like(noise)
    state = noise[0]
    powers = keep ** torch.arange(1, block + 1, device=model.device, dtype=torch.float32)
    decay = (powers[:, None] / powers[None, :]).tril() * step
    for first in range(0, length, block):
        part = noise[first : first + block]
        n = part.shape[0]
        walk[first : first + n] = powers[:n, None] * state + decay[:n, :n] @ part
        state = walk[first + n - 1]
    scale = model.get_input_embeddings().weight.float().std()
    return (walk * scale).to(model.dtype).unsqueeze(0)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds on the device, and the result."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.inference_mode()
def measure_prefill(model: IndexCacheForCausalLM, inputs: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    """Median seconds of a one-shot prefill with a dynamic cache, and peak memory in GiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    times = []
    held = 0
    for _ in range(repeats):
        cache = DynamicCache(config=model.config)
        seconds, _ = timed(lambda cache=cache: model(**inputs, past_key_values=cache, logits_to_keep=1))
        times.append(seconds)
        held = sum(
            t.numel() * t.element_size()
            for layer in cache.layers
            for t in (layer.keys, layer.indexer_keys)
            if t is not None
        )
        del cache
    return {
        "prefill_s": sorted(times)[len(times) // 2],
        "prefill_all_s": times,
        "weights_gib": weights / 2**30,
        "cache_gib": held / 2**30,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


@torch.inference_mode()
def measure_decode(model: IndexCacheForCausalLM, inputs: dict[str, torch.Tensor], steps: int) -> dict[str, Any]:
    """Tokens a second at batch 1 after a prefill, into a static cache: step by step, and as a replayed CUDA graph."""
    length = next(iter(inputs.values())).shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + 2 * steps + 16)
    model(**inputs, past_key_values=cache, logits_to_keep=1)
    token = torch.full((1, 1), 7, device=model.device)

    def step() -> torch.Tensor:
        return model(token, past_key_values=cache, use_cache=True).logits

    for _ in range(3):
        step()
    eager_seconds, _ = timed(lambda: [step() for _ in range(steps)])
    found = {"decode_eager_tok_s": steps / eager_seconds}
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph_seconds, _ = timed(lambda: [graph.replay() for _ in range(steps)])
        found["decode_graph_tok_s"] = steps / graph_seconds
    except Exception as error:  # reported in the record: a capture that fails is a finding
        found["decode_graph_error"] = f"{type(error).__name__}: {error}"[:500]
    return found


@torch.inference_mode()
def neighbour_overlap(model: IndexCacheForCausalLM, inputs: dict[str, torch.Tensor], rows: int = 512) -> list[float]:
    """For each full layer, the mean share of a query's selection that the query before it selected too."""
    cache = DynamicCache(config=model.config)
    name, tensor = next(iter(inputs.items()))
    model(**{name: tensor[:, :-rows]}, past_key_values=cache, logits_to_keep=1)
    out = model(**{name: tensor[:, -rows:]}, past_key_values=cache, logits_to_keep=1, output_topk_indices=True)
    shares = []
    for indices in out.topk_indices:
        chosen = torch.zeros(rows, tensor.shape[1], dtype=torch.bool, device=indices.device)
        chosen.scatter_(1, indices[0].long().clamp(min=0), True)
        shares.append(float((chosen[1:] & chosen[:-1]).sum() / chosen[1:].sum()))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[10_000, 60_000, 120_000, 200_000])
    parser.add_argument("--patterns", nargs="+", default=["all full", "1/4"], choices=PATTERNS)
    parser.add_argument("--input", choices=["drift", "random"], default="drift")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--decode-steps", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    model = random_model(arguments.experts)
    record = {
        "what": f"30B shape, {arguments.experts} experts, bf16, random weights, {arguments.input} input",
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [],
    }
    for length in arguments.lengths:
        inputs = (
            {"inputs_embeds": drifting_embeddings(model, length)}
            if arguments.input == "drift"
            else {"input_ids": torch.randint(2, SHAPE["vocab_size"], (1, length), device=model.device)}
        )
        for name in arguments.patterns:
            model.set_index_share_pattern(PATTERNS[name])
            row = {"tokens": length, "pattern": name, **measure_prefill(model, inputs, arguments.repeats)}
            if arguments.decode_steps:
                row |= measure_decode(model, inputs, arguments.decode_steps)
            record["rows"].append(row)
            print(row, flush=True)
            arguments.output.write_text(json.dumps(record, indent=2) + "\n")
        model.set_index_share_pattern(PATTERNS["1/4"])
        record["rows"][-1]["neighbour_overlap"] = neighbour_overlap(model, inputs)
        print("neighbour overlap", [round(x, 3) for x in record["rows"][-1]["neighbour_overlap"]], flush=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
