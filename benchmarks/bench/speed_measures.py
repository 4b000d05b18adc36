"""The measurements of `indexcache bench`: seconds, tokens a second and memory of one model at one context length."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache

GIB = 2**30
# Steps before those that are timed with a full cache; a graph is recorded at the third.
WARM_STEPS = 5


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


def cache_bytes(cache: Any) -> int:
    """Bytes of latents (or keys and values) and index keys."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values, getattr(layer, "indexer_keys", None))]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class _Clock(LogitsProcessor):
    """Notes when each step's logits were asked for; it waits for the device at the first, the end of the prefill."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores unchanged."""
        if not self.times:
            synchronize(self.device)
        self.times.append(time.perf_counter())
        return scores


def measure_generate(
    model: Any, ids: torch.Tensor, way: str, steps: int, repeats: int, prefill_chunk: int | None = None
) -> dict[str, Any]:
    """`model.generate` after a prompt, batch 1, greedy: prefill and decoding.

    Args:
        model: ours or transformers'.
        ids: token ids `[1, tokens]`.
        way: `static` (`cache_implementation="static"`) or `dynamic` (what `generate` does unasked).
        steps: tokens to time, after 8 to warm up (recording or compilation included).
        repeats: calls; the first prefill of a kind compiles kernels.
        prefill_chunk: tokens of the prompt at a time (`prefill_chunk_size`); None: all.

    Returns:
        `prefill_seconds`, from the call to the first token's logits, and `tokens_per_second` of decoding, the best
        call's each, with all calls'; `warm_up_seconds` of the first 8 tokens; on CUDA in GiB the `cache`, the peak,
        and what that is above the cache and the weights.
    """
    device = model.device
    prefills, speeds, found = [], [], {}
    for _ in range(repeats):
        clock = _Clock(device)
        before = _start_peak(device)
        start = time.perf_counter()
        out = model.generate(
            ids,
            # A prompt may hold the padding's id.
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8 + steps,
            min_new_tokens=8 + steps,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([clock]),
            return_dict_in_generate=True,
            prefill_chunk_size=prefill_chunk,
            **({"cache_implementation": "static"} if way == "static" else {}),
        )
        synchronize(device)
        end = time.perf_counter()
        prefills.append(clock.times[0] - start)
        speeds.append(steps / (end - clock.times[7]))
        held = cache_bytes(out.past_key_values)
        found = {"warm_up_seconds": clock.times[7] - clock.times[0], "cache_gib": held / GIB, "steps": steps}
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            found |= {
                "weights_gib": before / GIB,
                "peak_gib": peak / GIB,
                "above_gib": (peak - before - held) / GIB,
            }
        del out
    return {
        "prefill_seconds": min(prefills),
        "tokens_per_second": max(speeds),
        "all_prefill_seconds": prefills,
        "all_tokens_per_second": speeds,
        **found,
    }


def _start_peak(device: torch.device) -> int:
    """Bytes in use now; the peak is counted from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


@torch.no_grad()
def measure_full_cache_decode(model: Any, tokens: int, batch: int, steps: int) -> dict[str, Any]:
    """Tokens a second of `batch` sequences with `tokens` rows of random latents each in a static cache.

    Steps are calls of the model, which on CUDA replays a graph of its own after the first few.
    """
    device, config = model.device, model.config
    cache: Any = StaticCache(config=config, max_cache_len=full_cache_rows(tokens, steps))
    token = torch.full((batch, 1), 7, device=device)
    model(token, past_key_values=cache)
    for layer in cache.layers:
        for name in ("keys", "indexer_keys"):
            rows = getattr(layer, name, None)
            if rows is not None:
                rows.normal_()
        layer.cumulative_length.fill_(tokens)
        if getattr(layer, "indexer_cumulative_length", None) is not None:
            layer.indexer_cumulative_length.fill_(tokens)

    def decode(count: int) -> None:
        for _ in range(count):
            model(token, past_key_values=cache, use_cache=True)

    decode(WARM_STEPS)
    seconds, _ = timed(lambda: decode(steps), device)
    return {"tokens_per_second": batch * steps / seconds, "cache_gib": cache_bytes(cache) / GIB, "steps": steps}


def full_cache_rows(tokens: int, steps: int) -> int:
    """Rows of a sequence in the cache of `measure_full_cache_decode`."""
    return tokens + WARM_STEPS + steps


@torch.no_grad()
def neighbour_overlap(model: Any, ids: torch.Tensor, cache: Any) -> dict[str, list[float]]:
    """How far neighbouring queries agree, by full layer, measured on tokens `ids [1, n]` that go on from `cache`.

    Returns:
        `layers`: the mean share of a query's selection that the query before it selected too; `unions_of_4`: keys that
        four adjacent queries select together, in selections of one. Empty when nothing need be left out.
    """
    out = model(ids, past_key_values=cache, logits_to_keep=1, output_topk_indices=True)
    length = cache.get_seq_length()
    found: dict[str, list[float]] = {"layers": [], "unions_of_4": []}
    for indices in out.topk_indices or ():
        rows = indices.shape[1] // 4 * 4
        slots = indices[0, :rows].long()
        chosen = torch.zeros(rows, length + 1, dtype=torch.bool, device=indices.device)
        chosen = chosen.scatter_(1, slots.masked_fill(slots < 0, length), True)[:, :length]
        found["layers"].append(float((chosen[1:] & chosen[:-1]).sum() / chosen[1:].sum()))
        together = chosen.view(rows // 4, 4, length).any(1)
        found["unions_of_4"].append(float(4 * together.sum() / chosen.sum()))
    return found
