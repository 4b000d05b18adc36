"""On a GPU, a trained checkpoint gives the same losses and greedy generations from `triton` as from `eager`.

    python -m indexcache.benchmarks.studies.trained_checkpoints demo/dsa_demo --windows demo/sample_windows.safetensors

For all layers full and for shared patterns, with dynamic and static caches. Two correct backends round differently in
bf16, so that a generation may part where two tokens are all but equally likely. Each first divergence is therefore
judged by the same weights in fp32: how far apart the two tokens' logits are there (`fp32_margin`), and by how much
each backend misses that. A near tie is a margin within two deviations of eager's own error in such margins; elsewhere
the backend that misses it by more is off. The logits' rms errors and the losses in fp32 tell whether the fast backend
rounds worse than eager.

The exit code is 1 when a loss differs by more than 1e-3, or a generation parts because the fast backend is off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import logging

from ...configuration.share_pattern import SharePattern
from ...conversion.io.load_source import load_source
from ...evaluation.perplexity import evaluate_windows
from ...runs.versions import stamp

LOSS_TOLERANCE = 1e-3
CACHES = ("dynamic", "static")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def generate(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, cache: str) -> tuple[torch.Tensor, ...]:
    """Greedy tokens `[N, new_tokens]` and the logits `[N, new_tokens, vocabulary]` in fp32 that chose them."""
    out = model.generate(
        prompts,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        cache_implementation=cache,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, prompts.shape[1] :], torch.stack(out.logits, 1).float()


def judged(exact: PreTrainedModel, prompts: torch.Tensor, eager: tuple, fast: tuple) -> list[dict[str, Any]]:
    """Every sequence at the step where `fast` first gives another token than `eager` (the last step if it never does).

    Up to there both have the same prefix, for which the fp32 model `exact` tells who is how far off.
    """
    found = []
    for row, differ in enumerate(fast[0] != eager[0]):
        step = int(differ.nonzero()[0]) if differ.any() else differ.numel() - 1
        prefix = torch.cat((prompts[row], eager[0][row, :step])).unsqueeze(0)
        logits = {"eager": eager[1][row, step], "fast": fast[1][row, step]}
        logits["fp32"] = exact(prefix, logits_to_keep=1).logits[0, -1].float()
        record: dict[str, Any] = {"prompt": row, "step": step, "differs": bool(differ.any())}
        # The two tokens in question: where none differs, the two that are likeliest in fp32.
        chosen = torch.stack((eager[0][row, step], fast[0][row, step]))
        if not differ.any():
            chosen = logits["fp32"].topk(2).indices
        margins = {name: float(one[chosen[0]] - one[chosen[1]]) for name, one in logits.items()}
        record |= {f"{name}_margin": margin for name, margin in margins.items()}
        for name in ("eager", "fast"):
            record[f"{name}_margin_error"] = abs(margins[name] - margins["fp32"])
            record[f"{name}_rms_error"] = float((logits[name] - logits["fp32"]).square().mean().sqrt())
        found.append(record)
    return found


def read_windows(path: Path, tensor: str, count: int) -> torch.Tensor:
    """The first windows, int64 `[count, L]`, of the tensor whose name ends so."""
    return next(value for name, value in load_file(path).items() if name.endswith(tensor))[:count].long()


@torch.inference_mode()
def compare(
    folder: Path,
    continued: torch.Tensor,
    scored: torch.Tensor,
    patterns: list[str],
    dtype: torch.dtype,
    new_tokens: int,
    fast: str,
) -> Iterator[dict[str, Any]]:
    """One record a pattern: losses by backend, and where the generations of the fast one part from eager's.

    The heads of the windows `continued [N, L]` are prompts; losses are of `scored [M, L]`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_source(folder, dtype=dtype, attn_implementation=fast).to(device).eval()
    exact = load_source(folder, dtype=torch.float32, attn_implementation="eager").to(device).eval()
    prompts = continued[:, : min(600, continued.shape[1] // 2)].to(device)
    for pattern in patterns:
        start = time.perf_counter()
        model.set_index_share_pattern(pattern)
        exact.set_index_share_pattern(pattern)
        losses, generated = {"fp32": evaluate_windows(exact, scored, batch_size=4).loss}, {}
        for backend, caches in (("eager", CACHES[:1]), (fast, CACHES)):
            model.set_attn_implementation(backend)
            losses[backend] = evaluate_windows(model, scored, batch_size=4).loss
            generated |= {(backend, cache): generate(model, prompts, new_tokens, cache) for cache in caches}
            print(f"{folder.name} {pattern} {backend}: {time.perf_counter() - start:.1f} s", flush=True)
        eager = generated["eager", "dynamic"]
        sequences = {cache: judged(exact, prompts, eager, generated[fast, cache]) for cache in CACHES}
        # How far eager is off in the difference of two logits: the measure of a near tie.
        noise = statistics.fmean(one["eager_margin_error"] ** 2 for one in sequences["dynamic"]) ** 0.5
        parted = {cache: [one for one in found if one["differs"]] for cache, found in sequences.items()}
        for one in (*parted["dynamic"], *parted["static"]):
            near = abs(one["fp32_margin"]) <= 2 * noise
            eager_is_off = one["eager_margin_error"] > one["fast_margin_error"]
            one["because"] = "near tie" if near else f"{'eager' if eager_is_off else 'fast'} off"
        reasons = Counter(one["because"] for found in parted.values() for one in found)
        record = {
            "checkpoint": folder.name,
            "dtype": str(dtype).removeprefix("torch."),
            "backend": fast,
            "pattern": pattern,
            "scored_tokens": scored.numel(),
            "losses": losses,
            "loss_difference": abs(losses["eager"] - losses[fast]),
            "generations": len(prompts),
            "new_tokens": new_tokens,
            "eager_margin_error_rms": noise,
            **{
                f"{name}_logits_rms_error": statistics.fmean(one[f"{name}_rms_error"] for one in sequences["dynamic"])
                for name in ("eager", "fast")
            },
            **{f"equal_{cache}": len(prompts) - len(found) for cache, found in parted.items()},
            "parted": dict(reasons),
            "divergences": parted,
        }
        print({name: value for name, value in record.items() if name != "divergences"}, flush=True)
        for cache, found in parted.items():
            for one in found:
                print("  ", cache, {k: round(v, 5) if isinstance(v, float) else v for k, v in one.items()}, flush=True)
        yield record


def main() -> None:
    """Compare, print, write; see the head of this file."""
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=Path, required=True, help="safetensors with an ..ids tensor [N, L]")
    parser.add_argument("--patterns", nargs="+", help="default: all full, 1/2 and 1/4 uniform")
    parser.add_argument(
        "--backend",
        choices=("triton", "sdpa"),
        default="triton" if torch.cuda.is_available() else "sdpa",
        help="what is held against eager; sdpa, PyTorch's own, tells how far apart two backends must be expected",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tensor", default="ids", help="how the name of the windows' tensor ends")
    parser.add_argument("--count", type=int, default=16, help="windows scored and continued")
    parser.add_argument(
        "--scored",
        metavar="FILE:TENSOR",
        help="other windows for the losses: bf16 leaves errors of 0.2 in a token's logits, so that over 30,000 "
        "tokens two exact backends' losses are 1e-3 apart by chance",
    )
    parser.add_argument("--scored-count", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    layers = json.loads((arguments.checkpoint / "config.json").read_text())["num_hidden_layers"]
    patterns = arguments.patterns or [SharePattern.uniform(layers, keep).letters for keep in ("1/1", "1/2", "1/4")]
    continued = scored = read_windows(arguments.windows, arguments.tensor, arguments.count)
    if arguments.scored:
        path, _, tensor = arguments.scored.rpartition(":")
        scored = read_windows(Path(path), tensor, arguments.scored_count)
    records = []
    for name in arguments.dtypes:
        for record in compare(
            arguments.checkpoint,
            continued,
            scored,
            patterns,
            DTYPES[name],
            arguments.new_tokens,
            arguments.backend,
        ):
            records.append(record)
            if arguments.output:
                document = {"machine": stamp(), "command": sys.argv[1:], "cases": records}
                arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    worst = max(record["loss_difference"] for record in records)
    equal = sum(r[f"equal_{cache}"] for r in records for cache in CACHES)
    print(
        f"{equal} of {sum(2 * r['generations'] for r in records)} generations equal, "
        f"the others part for {dict(sum((Counter(r['parted']) for r in records), Counter()))}; "
        f"losses differ by at most {worst:.2e}"
    )
    if worst > LOSS_TOLERANCE or any("fast off" in record["parted"] for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
