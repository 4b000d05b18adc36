r"""What multi-layer distillation gives: quality by pattern, with and without its cross-layer term, over seeds.

    python -m indexcache.benchmarks.distillation_quality CHECKPOINT TRAIN.safetensors:train TEST.safetensors:test \
        --output results.json --seeds 0 1 2 --jobs 6

Every run trains the same number of steps from the same checkpoint and is scored on the test windows. `--jobs`
processes share one GPU: a model of a few million parameters leaves most of it idle. Results are written as they come;
behind `--deadline` seconds no run is begun that would not end before it.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from ..conversion.families import INDEXER
from ..distillation.all_experts import use_all_experts
from ..distillation.data import TrainingWindows
from ..distillation.recipe import Recipe
from ..distillation.source import open_distillation_source
from ..distillation.trainer import DistillationTrainer, freeze_for, training_arguments
from ..evaluation.perplexity import evaluate_windows
from ..pattern_search.calibration import Sampling, windows_of_file
from ..pattern_search.windows import Windows

# Name: (full layers, cross-layer term, indexers start anew).
RUNS: dict[str, tuple[str, bool, bool]] = {
    "uniform 1/4": ("1/4", True, False),
    "uniform 1/4, no cross-layer": ("1/4", False, False),
    "all full": ("1/1", True, False),
    "uniform 1/2": ("1/2", True, False),
    "uniform 1/2, no cross-layer": ("1/2", False, False),
    "searched 1/4": ("searched", True, False),
    "dense, uniform 1/2": ("1/2", True, True),
}
SEARCHED = "FSFSSSSSSSSFFSSS"


def main() -> None:
    """Run what is asked for, `jobs` processes at a time."""
    options = _options().parse_args()
    started = time.monotonic()
    names = list(RUNS) if options.runs == ["all"] else options.runs
    once = ["dense, uniform 1/2"]
    tasks = [(name, seed) for seed in options.seeds for name in names if name not in once or seed == options.seeds[0]]
    context = multiprocessing.get_context("spawn")
    queue, found = context.Queue(), context.Queue()
    for task in tasks:
        queue.put(task)
    for _ in range(options.jobs):
        queue.put(None)
    workers = [context.Process(target=work, args=(options, queue, found), daemon=True) for _ in range(options.jobs)]
    for worker in workers:
        worker.start()
    results, left = [], options.jobs
    while left:
        result = found.get()
        if result is None:
            left -= 1
            continue
        if "failed" in result:
            print(f"FAILED {result['run']}, seed {result['seed']}: {result['failed'][-1500:]}", flush=True)
            continue
        results.append(result)
        brief = {key: result[key] for key in ("run", "seed", "loss", "text_loss", "recall", "seconds")}
        print(json.dumps({**brief, "at": round(time.monotonic() - started, 1)}), flush=True)
        document = {"machine": machine(), "command": sys.argv[1:], "summary": summary(results), "results": results}
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    for row in summary(results):
        print(json.dumps(row), flush=True)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("train", help="windows to train on: FILE.safetensors:NAME")
    parser.add_argument("test", help="windows to score on, with a recall mask")
    parser.add_argument("--output", type=Path, default=Path("distillation_quality.json"))
    parser.add_argument("--runs", nargs="+", default=["all"], choices=["all", *RUNS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds from now")
    parser.add_argument("--searched", default=SEARCHED, help="the searched pattern")
    parser.add_argument("--dense-steps", type=int, default=60)
    parser.add_argument("--sparse-steps", type=int, default=140)
    parser.add_argument("--dense-learning-rate", type=float, default=3e-3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--indexer-learning-rate", type=float, default=None)
    parser.add_argument("--schedule", default="cosine")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--log-every", type=int, default=20)
    return parser


def work(options: argparse.Namespace, queue: Any, found: Any) -> None:
    """One process: run what the queue gives, as long as there is time."""
    deadline = time.monotonic() + options.deadline
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
    longest = 0.0
    while (task := queue.get()) is not None:
        if time.monotonic() + longest > deadline:
            continue
        begun = time.monotonic()
        try:
            found.put(train_one(options, *task))
        except Exception:
            found.put({"run": task[0], "seed": task[1], "failed": traceback.format_exc()})
        # The first run compiles: the later ones tell how long a run takes.
        longest = time.monotonic() - begun if longest == 0 else max(0.8 * longest, time.monotonic() - begun)
    found.put(None)


def train_one(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One run: load, score, warm up, train sparsely, score."""
    started = time.monotonic()
    keep, cross_layer, anew = RUNS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe(
        dense_steps=options.dense_steps,
        sparse_steps=options.sparse_steps,
        dense_learning_rate=options.dense_learning_rate,
        learning_rate=options.learning_rate,
        indexer_learning_rate=options.indexer_learning_rate,
        schedule=options.schedule,
        batch_size=options.batch_size,
        cross_layer=cross_layer,
        precision=options.precision,
        gradient_checkpointing=False,
        seed=seed,
        log_every=options.log_every,
    )
    given: dict[str, Any] = {"pattern": options.searched} if keep == "searched" else {"keep": keep}
    source = open_distillation_source(str(options.checkpoint), **given)
    model, _ = source.load(torch.float32)
    if anew:
        forget_indexers(model, seed)
    use_all_experts(model)
    model.to(device)
    if device == "cuda":
        take_whole_batches()
    windows = TrainingWindows(_read(options.train).ids.to(torch.int32))
    test = _read(options.test)
    result: dict[str, Any] = {
        "run": name,
        "seed": seed,
        "pattern": source.pattern.letters,
        "recipe": recipe.as_dict(),
        "before": score(model, test) if seed == options.seeds[0] else None,
        "setup_seconds": time.monotonic() - started,
    }
    for stage in recipe.stages:
        freeze_for(stage, model)
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(stage, recipe, Path(folder), use_cpu=device == "cpu")
            arguments.save_strategy = "no"
            trainer = DistillationTrainer(model, stage, recipe, arguments, windows, check_every=50)
            trainer.train()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - begun
        entries = [entry for entry in trainer.state.log_history if "kl" in entry]
        result[stage] = {
            "seconds": seconds,
            "log": [{key: value for key, value in entry.items() if "/layer_" not in key} for entry in entries],
        }
        print(
            f"{name}, seed {seed}, {stage}: {seconds:.1f} s, {entries[-1].get('lm_loss', 0):.3f} lm_loss, "
            f"{entries[-1]['kl']:.3f} kl, {entries[-1]['recall']:.3f} recall of mass, "
            f"{time.monotonic() - started:.1f} s in all",
            flush=True,
        )
    last = score(model, test)
    return {
        **result,
        **last,
        "seconds": time.monotonic() - started,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }


def forget_indexers(model: torch.nn.Module, seed: int) -> None:
    """Give every indexer new weights, as a dense model's get."""
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if f".{INDEXER}" in f"{name}." and isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)):
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=model.config.initializer_range)
            else:
                module.reset_parameters()


def take_whole_batches() -> None:
    """Models this small are bound by launches: let what is computed in chunks be computed at once."""
    from ..kernels import indexer_distillation_reference, sparse_mla_reference
    from ..modeling_indexcache import indexer_training, modeling_indexcache

    indexer_distillation_reference.BLOCK_BYTES = sparse_mla_reference.GATHER_BLOCK_BYTES = 2**31
    indexer_training.BLOCK_BYTES = modeling_indexcache.ATTENTION_BLOCK_BYTES = 2**31


def score(model: Any, test: Windows) -> dict[str, float]:
    """Loss, loss on text and recall: in bf16 on a GPU, as the checkpoint was measured, in fp32 on a CPU."""
    if model.device.type == "cuda":
        biases = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model = copy.deepcopy(model).to(torch.bfloat16)
        for name, buffer in model.named_buffers():
            # Frequencies and the router's bias stay in fp32, as when a checkpoint is loaded.
            buffer.data = biases[name]
    scores = evaluate_windows(model, test.ids, test.recall, batch_size=16)
    return {"loss": scores.loss, "text_loss": scores.text_loss, "recall": scores.recall_accuracy or 0.0}


def _read(data: str) -> Windows:
    path, _, name = data.partition(":")
    return windows_of_file(Path(path), name, Sampling(), None)


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread (largest minus smallest) over seeds of each run."""
    rows = []
    for name in RUNS:
        of_run = [result for result in results if result["run"] == name]
        if not of_run:
            continue
        row: dict[str, Any] = {"run": name, "pattern": of_run[0]["pattern"], "seeds": len(of_run)}
        for key in ("loss", "text_loss", "recall"):
            values = [result[key] for result in of_run]
            row[key] = round(statistics.mean(values), 4)
            row[f"{key}_spread"] = round(max(values) - min(values), 4)
        row["before"] = next((result["before"] for result in of_run if result["before"]), None)
        row["seconds"] = round(statistics.mean(result["seconds"] for result in of_run), 1)
        rows.append(row)
    return rows


def machine() -> dict[str, Any]:
    """What it ran on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
