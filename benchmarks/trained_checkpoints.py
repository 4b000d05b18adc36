"""On a GPU, a trained checkpoint gives the same losses and greedy generations from `triton` as from `eager`.

    python -m indexcache.benchmarks.trained_checkpoints demo/dsa_demo --windows demo/sample_windows.safetensors

For all layers full and for shared patterns, with dynamic and static caches, in bf16; differences are printed and
written, and the exit code is 1 when a loss differs by more than 1e-3 or a generation differs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from ..configuration.share_pattern import SharePattern
from ..conversion.load_source import load_source
from ..evaluation.perplexity import evaluate_windows

LOSS_TOLERANCE = 1e-3


def compare(folder: Path, windows: Path, patterns: list[str], count: int, new_tokens: int) -> list[dict[str, object]]:
    """One record a pattern: losses by backend, and whether generations are equal to eager's with a dynamic cache."""
    tensors = load_file(windows)
    ids = next(value for name, value in tensors.items() if name.endswith("ids"))[:count].long()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = "triton" if device == "cuda" else "sdpa"
    model = load_source(folder, dtype=torch.bfloat16, attn_implementation=fast).to(device).eval()
    records = []
    for pattern in patterns:
        model.set_index_share_pattern(pattern)
        losses, generated = {}, {}
        for backend in ("eager", fast):
            model.set_attn_implementation(backend)
            losses[backend] = evaluate_windows(model, ids).loss
            for cache in ("dynamic", "static"):
                if cache == "static" and backend == "eager":
                    continue
                generated[backend, cache] = model.generate(
                    ids[:, :600].to(device),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    cache_implementation=cache,
                    disable_compile=True,
                )
        expected = generated["eager", "dynamic"]
        records.append(
            {
                "checkpoint": folder.name,
                "pattern": pattern,
                "losses": losses,
                "loss_difference": abs(losses["eager"] - losses[fast]),
                "generations": {
                    f"{backend} {cache}": f"{int((tokens == expected).all(-1).sum())} of {len(tokens)} equal"
                    for (backend, cache), tokens in generated.items()
                },
                "equal": all(bool((tokens == expected).all()) for tokens in generated.values()),
            }
        )
        print(records[-1], flush=True)
    return records


def main() -> None:
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=Path, required=True, help="safetensors with an ..ids tensor [N, L]")
    parser.add_argument("--patterns", nargs="+", help="default: all full, 1/2 and 1/4 uniform")
    parser.add_argument("--count", type=int, default=4, help="windows scored and continued")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    layers = json.loads((arguments.checkpoint / "config.json").read_text())["num_hidden_layers"]
    patterns = arguments.patterns or [SharePattern.uniform(layers, keep).letters for keep in ("1/1", "1/2", "1/4")]
    records = compare(arguments.checkpoint, arguments.windows, patterns, arguments.count, arguments.new_tokens)
    if arguments.output:
        arguments.output.write_text(json.dumps(records, indent=2) + "\n")
    if not all(record["equal"] and record["loss_difference"] <= LOSS_TOLERANCE for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
