r"""What multi-layer distillation gives: quality by pattern, with and without its cross-layer term, over seeds.

    python -m indexcache.benchmarks.studies.distillation_quality CHECKPOINT TRAIN.safetensors:train \
        TEST.safetensors:test --output results.json --seeds 0 1 2 --jobs 6

Every run trains the same number of steps from the same checkpoint and is scored on the test windows. `--jobs`
processes share the GPUs that are there: a model of a few million parameters leaves most of one idle. Results are
written as they come; behind `--deadline` seconds no run is begun that would not end before it.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...conversion.convert.families import INDEXER
from ...distillation.data import TrainingWindows
from ...distillation.recipe import Recipe
from ...distillation.source import open_distillation_source
from ...distillation.training.all_experts import use_all_experts
from ...distillation.training.trainer import DistillationTrainer, freeze_for, training_arguments
from ...evaluation.perplexity import evaluate_windows
from ...runs.versions import stamp
from ...runs.windows.window_sources import Sampling, windows_of_file
from ...runs.windows.windows import Windows


@dataclass(frozen=True)
class Run:
    """A row of the table.

    Attributes:
        keep: full layers, or `searched`.
        cross_layer: full layers learn from all layers that they serve.
        anew: indexers start from nothing, as a dense model's.
        longer: times the steps.
        once: with the first seed alone.
        last: when all else is done.
    """

    keep: str
    cross_layer: bool = True
    anew: bool = False
    longer: int = 1
    once: bool = False
    last: bool = False


RUNS = {
    "uniform 1/4": Run("1/4"),
    "uniform 1/4, longer": Run("1/4", longer=2),
    "dense, uniform 1/2": Run("1/2", anew=True, longer=2, once=True),
    "all full": Run("1/1"),
    "uniform 1/4, no cross-layer": Run("1/4", cross_layer=False),
    "uniform 1/2": Run("1/2"),
    "uniform 1/2, no cross-layer": Run("1/2", cross_layer=False),
    "searched 1/4": Run("searched"),
    "all full, longer": Run("1/1", longer=2, once=True, last=True),
}
SEARCHED = "FSFSSSSSSSSFFSSS"
WARM, UNTRAINED = "warm", "untrained"


def main() -> None:
    """Run what is asked for, `jobs` processes at a time; the rate is chosen among several by the first runs."""
    options = _options().parse_args()
    started = time.monotonic()
    names = list(RUNS) if options.runs == ["all"] else options.runs
    first, rates = options.seeds[0], list(options.learning_rate)
    context = multiprocessing.get_context("spawn")
    queue, found = context.Queue(), context.Queue()
    warmed, gpus = context.Event(), torch.cuda.device_count()
    workers = [
        context.Process(target=work, args=(options, gpu_of(number, gpus), queue, found, warmed), daemon=True)
        for number in range(options.jobs)
    ]
    for worker in workers:
        worker.start()
    results: list[dict[str, Any]] = []
    document: dict[str, Any] = {"machine": stamp(), "command": sys.argv[1:], "results": results}
    # One process compiles what all need, and another scores what is there.
    if options.no_warm:
        warmed.set()
    else:
        queue.put((WARM, first, rates[0]))
    if not options.no_untrained:
        queue.put((UNTRAINED, first, rates[0]))

    def take() -> bool:
        """Write down one result; False when a worker has left."""
        result = found.get()
        if result is None:
            return False
        if "untrained" in result:
            document["untrained"] = result["untrained"]
            print(json.dumps(result), flush=True)
            return True
        if "failed" in result:
            print(f"FAILED {result['run']}, seed {result['seed']}: {result['failed'][-1500:]}", flush=True)
            failures[0] += result["run"] == names[0]
            return True
        results.append(result)
        brief = {key: result[key] for key in ("run", "seed", "rate", "loss", "text_loss", "recall", "seconds")}
        print(json.dumps({**brief, "at": round(time.monotonic() - started, 1)}), flush=True)
        document["summary"] = summary([result for result in results if result["rate"] == rate])
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        return True

    rate, done, failures = rates[0], set(), [0]
    if len(rates) > 1:
        for rate in rates:
            queue.put((names[0], first, rate))
        while sum(result["run"] == names[0] for result in results) + failures[0] < len(rates):
            take()
        scored = [result for result in results if result["run"] == names[0]]
        rate = min(scored, key=lambda result: result["loss"])["rate"] if scored else rates[0]
        done = {(names[0], first)}
        print(f"the rest with --learning-rate {rate:g}", flush=True)
    tasks = [
        (name, seed)
        for seed in options.seeds
        for name in names
        if (name, seed) not in done and (seed == first or not RUNS[name].once)
    ]
    for name, seed in sorted(tasks, key=lambda task: RUNS[task[0]].last):
        queue.put((name, seed, rate))
    for _ in workers:
        queue.put(None)
    left = len(workers)
    while left:
        left -= not take()
    for row in summary([result for result in results if result["rate"] == rate]):
        print(json.dumps(row), flush=True)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("train", help="windows to train on: FILE.safetensors:NAME")
    parser.add_argument("test", help="windows to score on, with a recall mask")
    parser.add_argument("--output", type=Path, default=Path("distillation_quality.json"))
    parser.add_argument("--no-untrained", action="store_true", help="do not score the patterns as they are")
    parser.add_argument("--no-warm", action="store_true", help="kernels are compiled already")
    parser.add_argument("--runs", nargs="+", default=["all"], choices=["all", *RUNS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds from now")
    parser.add_argument("--searched", default=SEARCHED, help="the searched pattern")
    parser.add_argument("--dense-steps", type=int, default=131)
    parser.add_argument("--sparse-steps", type=int, default=423)
    parser.add_argument("--dense-learning-rate", type=float, default=3e-3)
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[3e-4], help="several: the best is taken")
    parser.add_argument("--indexer-learning-rate", type=float, default=None)
    parser.add_argument("--schedule", default="cosine")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--attention", default=None, help="attn_implementation of the training")
    parser.add_argument("--cuda-graph", action="store_true", help="replay steps as CUDA graphs")
    parser.add_argument("--log-every", type=int, default=20)
    return parser


def gpu_of(job: int, gpus: int) -> str | None:
    """The device that a job sees: the GPUs in turn, as they are numbered outside; None without any."""
    if not gpus:
        return None
    outside = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = outside.split(",") if outside else [str(gpu) for gpu in range(gpus)]
    return names[job % gpus]


def work(options: argparse.Namespace, gpu: str | None, queue: Any, found: Any, warmed: Any) -> None:
    """One process: run what the queue gives, as long as there is time."""
    if gpu is not None:
        # Before anything touches CUDA.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    deadline = time.monotonic() + options.deadline
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    # Seconds that the usual steps took.
    usual = 0.0
    while (task := queue.get()) is not None:
        name, seed, rate = task
        if name in (WARM, UNTRAINED):
            try:
                found.put({"untrained": score_untrained(options)}) if name == UNTRAINED else warm(options, rate)
            except Exception:
                found.put({"run": name, "seed": seed, "failed": traceback.format_exc()})
            if name == WARM:
                warmed.set()
            continue
        warmed.wait()
        longer = RUNS[name].longer
        if time.monotonic() + 0.9 * usual * longer > deadline:
            print(f"no time for {name}, seed {seed}", flush=True)
            continue
        try:
            result = train_one(options, name, seed, rate)
            found.put(result)
            usual = sum(result[stage]["seconds"] for stage in ("dense", "sparse") if stage in result) / longer + 3
        except Exception:
            found.put({"run": name, "seed": seed, "failed": traceback.format_exc()})
    found.put(None)


def train_one(options: argparse.Namespace, name: str, seed: int, rate: float) -> dict[str, Any]:
    """One run: load, score, warm up, train sparsely, score."""
    started = time.monotonic()
    run = RUNS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe(
        dense_steps=options.dense_steps * run.longer,
        sparse_steps=options.sparse_steps * run.longer,
        dense_learning_rate=options.dense_learning_rate,
        learning_rate=rate,
        indexer_learning_rate=options.indexer_learning_rate,
        schedule=options.schedule,
        batch_size=options.batch_size,
        cross_layer=run.cross_layer,
        precision=options.precision,
        gradient_checkpointing=False,
        cuda_graph=options.cuda_graph,
        seed=seed,
        log_every=options.log_every,
    )
    given: dict[str, Any] = {"pattern": options.searched} if run.keep == "searched" else {"keep": run.keep}
    source = open_distillation_source(str(options.checkpoint), **given)
    model, _ = source.load(torch.float32)
    if run.anew:
        forget_indexers(model, seed)
    use_all_experts(model)
    usual_attention = model.config._attn_implementation
    if options.attention is not None:
        model.set_attn_implementation(options.attention)
    model.to(device)
    if device == "cuda":
        take_whole_batches()
    windows = TrainingWindows(_read(options.train).ids.to(torch.int32))
    test = _read(options.test)
    result: dict[str, Any] = {
        "run": name,
        "seed": seed,
        "rate": rate,
        "pattern": source.pattern.letters,
        "recipe": recipe.as_dict(),
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
            f"{name}, seed {seed}, rate {rate:g}, {stage}: {seconds:.1f} s, "
            f"{entries[-1].get('lm_loss', 0):.3f} lm_loss, {entries[-1]['kl']:.3f} kl, "
            f"{entries[-1]['recall']:.3f} recall of mass, "
            f"{time.monotonic() - started:.1f} s in all",
            flush=True,
        )
    model.set_attn_implementation(usual_attention)
    last = score(model, test)
    return {
        **result,
        **last,
        "seconds": time.monotonic() - started,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }


def warm(options: argparse.Namespace, rate: float) -> None:
    """Compile the kernels of both stages."""
    few = argparse.Namespace(**{**vars(options), "dense_steps": 2, "sparse_steps": 2, "log_every": 2})
    train_one(few, "uniform 1/4", 0, rate)


def score_untrained(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Scores of the checkpoint under each pattern, without training."""
    test, found = _read(options.test), {}
    for keep in dict.fromkeys(run.keep for run in RUNS.values()):
        given: dict[str, Any] = {"pattern": options.searched} if keep == "searched" else {"keep": keep}
        model, _ = open_distillation_source(str(options.checkpoint), **given).load(torch.float32)
        found[keep] = score(model.to("cuda" if torch.cuda.is_available() else "cpu"), test)
    return found


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
    from ...kernels.indexer_distillation import indexer_distillation_reference
    from ...kernels.sparse_mla import sparse_mla_reference
    from ...modeling_indexcache.attention import query_chunks
    from ...modeling_indexcache.training import indexer_training

    indexer_distillation_reference.BLOCK_BYTES = sparse_mla_reference.GATHER_BLOCK_BYTES = 2**31
    indexer_training.BLOCK_BYTES = query_chunks.ATTENTION_BLOCK_BYTES = 2**31


def score(model: Any, test: Windows) -> dict[str, float]:
    """Loss, loss on text and recall: in bf16 on a GPU, as the checkpoint was measured, in fp32 on a CPU."""
    if model.device.type == "cuda":
        trained, model = model, copy.deepcopy(model).to(torch.bfloat16)
        for name, buffer in trained.named_buffers():
            # Frequencies and the router's bias stay in fp32, as when a checkpoint is loaded.
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, buffer.clone())
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
        row["seconds"] = round(statistics.mean(result["seconds"] for result in of_run), 1)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
