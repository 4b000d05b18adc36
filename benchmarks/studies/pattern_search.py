"""What a pattern search costs and how much it hangs on its windows.

    python -m indexcache.benchmarks.studies.pattern_search growth
    python -m indexcache.benchmarks.studies.pattern_search time CHECKPOINT WINDOWS.safetensors --keep 1/8
    python -m indexcache.benchmarks.studies.pattern_search draws CHECKPOINT --calibration F:N --test F:N

`growth` counts layer-forwards by depth (tiny random models, any machine). `time` loads a checkpoint, warms up with one
pass over the windows, and times the search itself: Algorithm 1 (`greedy`) or the default (`lazy`), no held-out checks.
`draws` searches with each set of calibration windows, by each objective asked for, and scores every pattern found, and
all full, on each set of test windows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...conversion.io.load_source import load_source
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ...pattern_search.algorithms.floating import refine
from ...pattern_search.algorithms.greedy import greedy
from ...pattern_search.algorithms.lazy_greedy import lazy_greedy
from ...pattern_search.measure.evaluator import Evaluation, Evaluator
from ...pattern_search.measure.prefix_cache import PrefixCache
from ...runs.versions import stamp
from ...runs.windows.calibration import load_windows
from ...runs.windows.window_sources import Sampling, read_windows
from ...runs.windows.windows import Windows
from .every_pattern import PrefixTree, means

RESULTS = Path(__file__).parents[1] / "results"
DEPTHS = (8, 12, 16, 24, 32, 47)
PATH_ROUNDS = 3
# What `draws` searches by: objective and teacher.
SEARCHED_BY = {"dense": ("kl", "dense"), "source": ("kl", "source"), "loss": ("lm", "source")}


def random_model(num_layers: int, seed: int = 0) -> IndexCacheForCausalLM:
    """A tiny model with random weights, fp32, on the CPU."""
    torch.manual_seed(seed)
    config = IndexCacheConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=num_layers,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=num_layers, index_topk=8, index_n_heads=4, index_head_dim=16,
        max_position_embeddings=128, initializer_range=0.15, bos_token_id=0, eos_token_id=96, pad_token_id=1,
    )  # fmt: skip
    return IndexCacheForCausalLM(config).eval()


def growth(depths: list[int], num_windows: int = 16, seqlen: int = 48) -> list[dict[str, Any]]:
    """Layer-forwards of a whole sweep (all full to one full layer) by depth, a window."""
    ids = torch.randint(2, 97, (num_windows, seqlen + 1), generator=torch.Generator().manual_seed(0))
    rows = []
    for depth in depths:
        model = random_model(depth)
        row: dict[str, Any] = {"layers": depth, "windows": num_windows}
        row["paper"] = depth * (depth - 1) // 2 * depth * num_windows
        for name, objective, batch in (("greedy, prefixes reused", "lm", num_windows), ("lazy", "kl", 1)):
            evaluator = Evaluator(
                "calibration", model, Windows(ids), objective=objective, batch_size=batch,
                cache=PrefixCache(2**31),
            )  # fmt: skip
            start = "F" * depth
            if name == "lazy":
                steps = lazy_greedy(evaluator, start, rounds=PATH_ROUNDS)
                row["lazy path"] = evaluator.layer_forwards
                for keep in {depth // 2, depth // 4, depth // 8}:
                    refine(evaluator, next(step.pattern for step in steps if step.pattern.count("F") == keep))
                row["lazy path and refinement at 1/2, 1/4, 1/8"] = evaluator.layer_forwards
            else:
                greedy(evaluator, start)
                row[name] = evaluator.layer_forwards
        rows.append(row)
        print(row, flush=True)
    return rows


def draw_growth(rows: list[dict[str, Any]], path: Path) -> None:
    """Layer-forwards a window against depth, both axes logarithmic."""
    from ...pattern_search.figures import save_plot

    names = {
        "paper": "Algorithm 1 as published",
        "greedy, prefixes reused": "greedy, prefixes reused",
        "lazy path and refinement at 1/2, 1/4, 1/8": "lazy, refined at 1/2, 1/4, 1/8",
        "lazy path": "lazy, path alone",
    }
    lines = {label: [(row["layers"], row[name] / row["windows"]) for row in rows] for name, label in names.items()}
    save_plot(lines, "layers of the model", "layer-forwards a window", path)


def searched(evaluator: Evaluator, counts: set[int]) -> list[Evaluation]:
    """The default search: a lazy path, refined at each number of full layers; the largest first."""
    steps = lazy_greedy(evaluator, "F" * evaluator.num_layers, min(counts), PATH_ROUNDS)
    path = {step.pattern.count("F"): step.pattern for step in steps}
    return [refine(evaluator, path[count]) for count in sorted(counts, reverse=True)]


@contextmanager
def clock(record: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds of a block, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    record[name] = round(time.perf_counter() - begun, 3)


def timed_search(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, warm up, search; seconds and layer-forwards."""
    record: dict[str, Any] = {"algorithm": arguments.algorithm, "keep": arguments.keep}
    on_cuda = torch.cuda.is_available()
    with clock(record, "load_seconds"):
        model = load_source(
            arguments.checkpoint, dtype=getattr(torch, arguments.dtype), attn_implementation=arguments.attention
        )
        model = model.to("cuda" if on_cuda else "cpu").eval()  # type: ignore[arg-type]
    record |= {"dtype": arguments.dtype, "attention": model.config._attn_implementation}
    windows, _ = load_windows(
        f"{arguments.windows}:calibration", model.config, None, Sampling(), f"{arguments.windows}:test"
    )
    greedily = arguments.algorithm == "greedy"

    def fresh() -> Evaluator:
        return Evaluator(
            "calibration", model, windows, objective="lm" if greedily else "kl", teacher="auto",
            batch_size=arguments.batch_size,
            cache=PrefixCache(arguments.cache_gb * 2**30), reference_bytes=2**31,
        )  # fmt: skip

    evaluator = fresh()
    start = "F" * evaluator.num_layers
    with clock(record, "warm_up_seconds"):
        for batch in range(len(evaluator.batches)):
            evaluator.scorer.score(batch, evaluator.engine.last_hidden(start[:-1] + "S", batch))
    # What the warm-up kept would be a head start.
    evaluator = fresh()
    keep = max(1, round(evaluator.num_layers * arguments.keep))
    with clock(record, "search_seconds"):
        if greedily:
            steps = greedy(evaluator, start, keep)
            record["patterns"] = [step.pattern for step in steps]
        else:
            counts = {evaluator.num_layers // 2, evaluator.num_layers // 4, keep}
            record["patterns"] = [found.pattern for found in searched(evaluator, counts)]
    return record | {
        "windows": len(windows),
        "tokens_a_window": windows.seqlen,
        "batch_size": arguments.batch_size,
        "layer_forwards": evaluator.layer_forwards,
        "evaluations": evaluator.journal.count("calibration"),
    }


def search_draws(arguments: argparse.Namespace) -> dict[str, Any]:
    """Patterns by calibration windows and objective, and what they score on the test windows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_source(arguments.checkpoint, dtype=getattr(torch, arguments.dtype)).to(device)  # type: ignore[arg-type]

    def windows(name: str) -> Windows:
        return read_windows(name, None, Sampling(), 0, 0)

    searches = []
    for name in arguments.calibration:
        for by in arguments.by or SEARCHED_BY:
            objective, teacher = SEARCHED_BY[by]
            evaluator = Evaluator(
                "calibration", model, windows(name), objective=objective, teacher=teacher,
                cache=PrefixCache(arguments.cache_gb * 2**30), reference_bytes=2**31,
            )  # fmt: skip
            row: dict[str, Any] = {"calibration": Path(name).name, "by": by}
            with clock(row, "seconds"):
                row["patterns"] = {
                    found.pattern.count("F"): found.pattern for found in searched(evaluator, set(arguments.keep))
                }
            row["layer_forwards"] = evaluator.layer_forwards
            searches.append(row)
            print(row, flush=True)
    found = {pattern for row in searches for pattern in row["patterns"].values()} | set(arguments.also)
    patterns = sorted({"F" * model.config.num_hidden_layers, *found})
    scores: dict[str, dict[str, Any]] = {}
    for name in arguments.test:
        tested = windows(name)
        tree = PrefixTree(model, tested, arguments.batch_size)
        for pattern, sums in zip(patterns, tree.score(patterns, list(range(len(tested))))):
            scores.setdefault(pattern, {})[Path(name).name] = means(sums, tested)
            print(pattern, name, scores[pattern][Path(name).name], flush=True)
    return {"searches": searches, "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    growing = verbs.add_parser("growth")
    growing.add_argument("--picture", type=Path)
    growing.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))
    timing = verbs.add_parser("time")
    timing.add_argument("checkpoint")
    timing.add_argument("windows", help="safetensors with calibration_ids and test_ids")
    timing.add_argument("--algorithm", choices=("greedy", "lazy"), default="greedy")
    timing.add_argument(
        "--keep", type=lambda text: float(text) if "/" not in text else 1 / int(text[2:]), default=1 / 8
    )
    timing.add_argument("--batch-size", type=int, default=16 if torch.cuda.is_available() else 1)
    timing.add_argument("--cache-gb", type=int, default=4)
    timing.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    timing.add_argument("--attention", help="triton, sdpa, eager; the best of the machine when not given")
    drawing = verbs.add_parser("draws")
    drawing.add_argument("checkpoint")
    drawing.add_argument("--calibration", action="append", default=[], help="windows, FILE.safetensors:NAME; repeat")
    drawing.add_argument("--test", action="append", required=True, help="windows, FILE.safetensors:NAME; repeat")
    drawing.add_argument("--keep", type=int, action="append", required=True)
    drawing.add_argument("--by", choices=SEARCHED_BY, action="append", help="all when not given")
    drawing.add_argument("--also", action="append", default=[], help="patterns to score too")
    drawing.add_argument("--cache-gb", type=int, default=4)
    drawing.add_argument("--batch-size", type=int, default=64 if torch.cuda.is_available() else 4)
    drawing.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    for verb in (growing, timing, drawing):
        verb.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "growth":
        found: Any = growth(arguments.depths)
        if arguments.picture:
            draw_growth(found, arguments.picture)
        output = arguments.output or RESULTS / "pattern_search_growth.json"
    elif arguments.verb == "draws":
        found = search_draws(arguments)
        output = arguments.output or RESULTS / "pattern_search_draws.json"
    else:
        found = timed_search(arguments)
        print(json.dumps(found, indent=1))
        output = arguments.output or RESULTS / f"pattern_search_{arguments.algorithm}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": stamp(), "result": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
