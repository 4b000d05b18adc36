"""What multi-layer distillation gives: quality by pattern, with and without its cross-layer term, over seeds.

    python -m indexcache.benchmarks.distillation_quality CHECKPOINT TRAIN.safetensors TEST.safetensors:test \\
        --output results.json --runs all --seeds 0 1 2 --jobs 6

Every run trains the same number of steps from the same checkpoint and is scored on the test windows. `--jobs`
processes share one GPU: a model of a few million parameters leaves most of it idle.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

# Name: (full layers, cross-layer term, indexers start anew).
RUNS: dict[str, tuple[str, bool, bool]] = {
    "all full": ("1/1", True, False),
    "uniform 1/2": ("1/2", True, False),
    "uniform 1/2, no cross-layer": ("1/2", False, False),
    "uniform 1/4": ("1/4", True, False),
    "uniform 1/4, no cross-layer": ("1/4", False, False),
    "searched 1/4": ("searched", True, False),
    "searched 1/4, no cross-layer": ("searched", False, False),
    "dense, uniform 1/2": ("1/2", True, True),
}
SEARCHED = "FSFSSSSSSSSFFSSS"


def main() -> None:
    """Run all, or the one that `--one` names (as a process of its own)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("train", help="windows to train on: FILE.safetensors:NAME")
    parser.add_argument("test", help="windows to score on, with a recall mask")
    parser.add_argument("--output", type=Path, default=Path("distillation_quality.json"))
    parser.add_argument("--runs", nargs="+", default=["all"], choices=["all", *RUNS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--searched", default=SEARCHED, help="the searched pattern")
    parser.add_argument("--dense-steps", type=int, default=131)
    parser.add_argument("--sparse-steps", type=int, default=141)
    parser.add_argument("--dense-learning-rate", type=float, default=3e-3)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--indexer-learning-rate", type=float, default=None)
    parser.add_argument("--schedule", default="cosine")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--one", nargs=2, metavar=("RUN", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(train_one(options, options.one[0], int(options.one[1]))), flush=True)
        return
    wanted = list(RUNS) if options.runs == ["all"] else options.runs
    results = run_all(options, [(name, seed) for seed in options.seeds for name in wanted])
    document = {"machine": machine(), "command": sys.argv[1:], "results": results, "summary": summary(results)}
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    for row in document["summary"]:
        print(row, flush=True)


def run_all(options: argparse.Namespace, wanted: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """The runs, `jobs` at a time, each a process; a run that fails is reported and the others go on."""
    waiting, running, results = list(wanted), [], []
    threads = str(max(1, (os.cpu_count() or 1) // max(1, options.jobs)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name, seed = waiting.pop(0)
            log = tempfile.TemporaryFile("w+")
            command = [
                sys.executable,
                "-m",
                __spec__.name if __spec__ else __name__,
                *sys.argv[1:],
                "--one",
                name,
                str(seed),
            ]
            running.append((name, seed, subprocess.Popen(command, stdout=log, stderr=log, env=environment), log))
        time.sleep(0.2)
        for entry in [entry for entry in running if entry[2].poll() is not None]:
            running.remove(entry)
            name, seed, process, log = entry
            log.seek(0)
            text = log.read()
            lines = [line for line in text.splitlines() if line.startswith("RESULT ")]
            if process.returncode or not lines:
                print(f"FAILED {name} seed {seed}: {text[-1500:]}", flush=True)
                continue
            results.append(json.loads(lines[-1].removeprefix("RESULT ")))
            brief = {key: results[-1][key] for key in ("run", "seed", "loss", "recall", "seconds")}
            print(json.dumps(brief), flush=True)
    return results


def train_one(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One run: load, score, warm up, score, train sparsely, score."""
    from indexcache.configuration.share_pattern import SharePattern
    from indexcache.distillation.all_experts import use_all_experts
    from indexcache.distillation.recipe import Recipe
    from indexcache.distillation.source import open_distillation_source
    from indexcache.distillation.trainer import DistillationTrainer, freeze_for, training_arguments
    from indexcache.pattern_search.calibration import Sampling, windows_of_file

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
    torch.manual_seed(seed)
    model, _ = source.load(torch.float32)
    if anew:
        for module in model.modules():
            if module.__class__.__name__ == "IndexCacheIndexer":
                for part in module.modules():
                    if part is not module and isinstance(part, (torch.nn.Linear, torch.nn.LayerNorm)):
                        part.reset_parameters()
    use_all_experts(model)
    model.to(device)
    if device == "cuda":
        _take_whole_batches()
    path, _, tensor = options.train.partition(":")
    from indexcache.distillation.data import TrainingWindows

    windows = TrainingWindows(windows_of_file(Path(path), tensor or "train", Sampling(), None).ids.to(torch.int32))
    path, _, tensor = options.test.partition(":")
    test = windows_of_file(Path(path), tensor, Sampling(), None)
    result: dict[str, Any] = {
        "run": name,
        "seed": seed,
        "pattern": SharePattern.parse(source.pattern).letters,
        "recipe": recipe.as_dict(),
        "before": score(model, test),
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
        entries = [entry for entry in trainer.state.log_history if "kl" in entry]
        result[stage] = {
            "seconds": time.monotonic() - begun,
            "log": [{key: value for key, value in entry.items() if "/layer_" not in key} for entry in entries],
            "after": score(model, test),
        }
        seconds = f"{result[stage]['seconds']:.1f} s, {time.monotonic() - started:.1f} s in all"
        print(f"{name} seed {seed}, {stage}: {result[stage]['after']} after {seconds}", flush=True)
    last = result[recipe.stages[-1]]["after"]
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    result |= {
        "loss": last["loss"],
        "text_loss": last["text_loss"],
        "recall": last["recall"],
        "seconds": time.monotonic() - started,
        "peak_gib": memory,
    }
    return result


def _take_whole_batches() -> None:
    """Models this small are bound by launches: let what is computed in chunks be computed at once."""
    from indexcache.kernels import indexer_distillation_reference, sparse_mla_reference
    from indexcache.modeling_indexcache import indexer_training, modeling_indexcache

    indexer_distillation_reference.BLOCK_BYTES = sparse_mla_reference.GATHER_BLOCK_BYTES = 2**31
    indexer_training.BLOCK_BYTES = modeling_indexcache.ATTENTION_BLOCK_BYTES = 2**31


def score(model: Any, test: Any) -> dict[str, float]:
    """Loss, loss on text and recall in bf16 on a GPU, as the checkpoint was measured; fp32 on a CPU."""
    from indexcache.evaluation.perplexity import evaluate_windows

    cast = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")
    with cast:
        scores = evaluate_windows(model, test.ids, test.recall, batch_size=16)
    return {"loss": scores.loss, "text_loss": scores.text_loss, "recall": scores.recall_accuracy or 0.0}


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread (largest minus smallest) over seeds of each run."""
    rows = []
    for name in dict.fromkeys(result["run"] for result in results):
        of_run = [result for result in results if result["run"] == name]
        row: dict[str, Any] = {"run": name, "pattern": of_run[0]["pattern"], "seeds": len(of_run)}
        for key in ("loss", "text_loss", "recall"):
            values = [result[key] for result in of_run]
            row[key] = round(statistics.mean(values), 4)
            row[f"{key}_spread"] = round(max(values) - min(values), 4)
        row["before"] = {key: round(value, 4) for key, value in of_run[0]["before"].items()}
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
