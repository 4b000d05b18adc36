"""Prefill, peak memory and decoding of one model under each placement.

    python -m indexcache.benchmarks.studies.placement

A slice of DeepSeek-V3.2 at full width, random weights: on one device as it is, under accelerate's hooks as
`device_map` makes them, and with two GPUs on the second one and spread over both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ...runs.versions import stamp
from ..bench.speed_measures import measure_generate
from ..bench.speed_models import let_neighbours_agree, prompt

# Widths for a try without a GPU.
NARROW = dict(
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_attention_heads=8,
    index_n_heads=8,
    index_topk=64,
    vocab_size=512,
)


def slice_model(layers: int, experts: int, narrow: bool, device: torch.device) -> IndexCacheForCausalLM:
    """The first layers of DeepSeek-V3.2, one of them dense, with random weights, every second indexer shared."""
    groups = dict(n_group=8, topk_group=4) if experts >= 64 else dict(n_group=1, topk_group=1)
    pattern = ("FS" * layers)[:layers]
    config = IndexCacheConfig(
        num_hidden_layers=layers,
        n_routed_experts=experts,
        first_k_dense_replace=1,
        index_share_pattern=pattern,
        **groups,
        **(NARROW if narrow else {}),
    )
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = IndexCacheForCausalLM._from_config(config, dtype=dtype).eval()
    let_neighbours_agree(model)
    return model


def device_maps(model: IndexCacheForCausalLM, device: torch.device) -> dict[str, dict[str, Any] | None]:
    """Placement by name; None is the model as it is."""
    layers = model.config.num_hidden_layers
    here: Any = 0 if device.type == "cuda" else "cpu"
    parts = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(layers)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    maps: dict[str, dict[str, Any] | None] = {"one device": None, "hooks on one device": dict.fromkeys(parts, here)}
    if torch.cuda.device_count() > 1:
        half = dict.fromkeys(parts, 0)
        half |= {f"model.layers.{i}": 1 for i in range(layers // 2, layers)} | {"model.norm": 1, "lm_head": 1}
        maps |= {"second device": dict.fromkeys(parts, 1), "two devices": half}
    return maps


def main() -> None:
    """Measure every placement and write `placement.json`."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--experts", type=int, default=32)
    arguments.add_argument("--length", type=int, nargs="+", default=[131072])
    arguments.add_argument("--narrow", action="store_true", help="Small widths, to try the script on a CPU.")
    arguments.add_argument("--output", type=Path, default=Path("placement.json"))
    chosen = arguments.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = slice_model(chosen.layers, chosen.experts, chosen.narrow, device)
    rows = []
    for name, placement in device_maps(model, device).items():
        if placement is not None:
            dispatch_model(model, placement, force_hooks=True, skip_keys=model._skip_keys_device_placement)
        for length in chosen.length:
            for _ in ("compiling", "measured"):
                try:
                    found = measure_generate(model, prompt(model, length, "drift"), "dynamic", 32, 1)
                except torch.OutOfMemoryError:
                    found = {"out_of_memory": True}
                    torch.cuda.empty_cache()
            rows.append({"placement": name, "length": length, **found})
            print(json.dumps(rows[-1]), flush=True)
        remove_hook_from_module(model, recurse=True)
    chosen.output.write_text(json.dumps({"machine": stamp(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
