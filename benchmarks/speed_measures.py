"""The measurements of `indexcache bench`: seconds, tokens a second and memory of one model at one context length."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

GIB = 2**30


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device is done, and the result."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


@torch.no_grad()
def measure_prefill(model: Any, inputs: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    """A one-shot prefill into a dynamic cache.

    Returns:
        `seconds` (median) and all of them, and on CUDA in GiB: `weights`, `cache` (latents and index keys) and
        `above`, the peak beyond those and the input.
    """
    device = model.device
    small = {name: tensor[:, : min(tensor.shape[1], 4096)] for name, tensor in inputs.items()}
    model(**small, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    found: dict[str, Any] = {}
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times = []
    for _ in range(repeats):
        cache = DynamicCache(config=model.config)
        call = partial(model, **inputs, past_key_values=cache, logits_to_keep=1)
        seconds, _ = timed(call, device)
        times.append(seconds)
        held = cache_bytes(cache)
        del cache, call
    found |= {"seconds": statistics.median(times), "all_seconds": times, "cache_gib": held / GIB}
    if device.type == "cuda":
        given = sum(t.numel() * t.element_size() for t in inputs.values())
        found |= {
            "weights_gib": (before - given) / GIB,
            "peak_gib": (torch.cuda.max_memory_allocated(device) - given) / GIB,
            "above_gib": (torch.cuda.max_memory_allocated(device) - before - held) / GIB,
        }
    return found


def cache_bytes(cache: Any) -> int:
    """Bytes of latents (or keys and values) and index keys."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values, getattr(layer, "indexer_keys", None))]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class _Clock(LogitsProcessor):
    """Notes when each step's logits were asked for; it does not wait for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores unchanged."""
        self.times.append(time.perf_counter())
        return scores


def measure_decode(model: Any, inputs: dict[str, torch.Tensor], way: str, steps: int) -> dict[str, Any]:
    """Tokens a second of `model.generate` after a prompt, batch 1, greedy.

    Args:
        model: ours or transformers'.
        inputs: of one sequence.
        way: `static` (`cache_implementation="static"`: compiled on CUDA) or `dynamic` (what `generate` does unasked).
        steps: tokens to time, after as many as the first half of them to warm up (compilation included).

    Returns:
        `tokens_per_second` of the later steps, and `first_step_seconds`, compilation and capture included.
    """
    clock = _Clock()
    options: dict[str, Any] = {"cache_implementation": "static"} if way == "static" else {}
    warm = max(4, steps // 2)
    model.generate(
        **inputs,
        max_new_tokens=warm + steps,
        min_new_tokens=warm + steps,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([clock]),
        **options,
    )
    synchronize(model.device)
    end = time.perf_counter()
    return {
        "tokens_per_second": steps / (end - clock.times[warm - 1]),
        "first_step_seconds": clock.times[1] - clock.times[0],
        "steps": steps,
    }


@torch.no_grad()
def measure_full_cache_decode(model: Any, tokens: int, batch: int, steps: int) -> dict[str, Any]:
    """Tokens a second of `batch` sequences with `tokens` rows of random latents each in a static cache.

    On CUDA a step is one CUDA graph, on the CPU a call.
    """
    device, config = model.device, model.config
    cache: Any = StaticCache(config=config, max_cache_len=tokens + 1)
    token = torch.full((batch, 1), 7, device=device)
    model(token, past_key_values=cache)
    for layer in cache.layers:
        for name in ("keys", "indexer_keys"):
            rows = getattr(layer, name, None)
            if rows is not None:
                rows.normal_()

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(tokens)
            if getattr(layer, "indexer_cumulative_length", None) is not None:
                layer.indexer_cumulative_length.fill_(tokens)

    def step() -> Any:
        rewind()
        return model(token, past_key_values=cache, use_cache=True).logits

    call = captured(step) if device.type == "cuda" else step
    call()
    seconds, _ = timed(lambda: [call() for _ in range(steps)], device)
    return {"tokens_per_second": batch * steps / seconds, "cache_gib": cache_bytes(cache) / GIB, "steps": steps}


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph's replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.result = call()  # type: ignore[attr-defined]  # lives as long as the graph
    return graph.replay


@torch.no_grad()
def neighbour_overlap(model: Any, inputs: dict[str, torch.Tensor], rows: int = 256) -> list[float]:
    """For each full layer, the mean share of a query's selection that the query before it selected too.

    Of the last `rows` queries; empty when the input is no longer than the selection.
    """
    name, tensor = next(iter(inputs.items()))
    length = tensor.shape[1]
    rows = min(rows, length // 2)
    cache = DynamicCache(config=model.config)
    model(**{name: tensor[:, :-rows]}, past_key_values=cache, logits_to_keep=1)
    out = model(**{name: tensor[:, -rows:]}, past_key_values=cache, logits_to_keep=1, output_topk_indices=True)
    shares = []
    for indices in out.topk_indices or ():
        chosen = torch.zeros(rows, length + 1, dtype=torch.bool, device=indices.device)
        slots = indices[0].long()
        chosen.scatter_(1, slots.masked_fill(slots < 0, length), True)
        chosen = chosen[:, :length]
        shares.append(float((chosen[1:] & chosen[:-1]).sum() / chosen[1:].sum()))
    return shares
