"""Train the demo checkpoint from nothing: dense language modelling, indexer warm-up, sparse training.

    make demo-checkpoint TEXT=psf.txt.xz WINDOWS=demo_windows.safetensors:test OUT=/tmp/dsa_demo

TEXT is the text that `demo/dsa_demo/NOTICE` names, UTF-8, documents separated by NUL, compressed by xz or not; its
last 1.5 % of documents are held out. WINDOWS are test windows made of those (`test_ids`, `test_recall`);
`calibration_ids` in the same file are those that the card's patterns are searched on. OUT becomes what `demo/dsa_demo`
is: a checkpoint in DeepSeek-V3.2's own format with its log, probe and card. It may take that one's place when it is
good enough: the script says so, and never replaces it itself. Takes eight minutes on an H100; what was stopped goes on
with `--resume` from `OUT.work`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from finish_checkpoint import DEMO, finish
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from indexcache import IndexCacheForCausalLM
from indexcache.benchmarks.studies.recall_windows import recall_windows
from indexcache.conversion.convert.families import convert_config, load_config
from indexcache.conversion.publish.bundle import AUTO_MAP
from indexcache.conversion.publish.export import export
from indexcache.distillation.data import TrainingWindows
from indexcache.distillation.output import LOG_FILE
from indexcache.distillation.recipe import Recipe
from indexcache.distillation.run import run_distillation
from indexcache.distillation.run_options import DistillationRun
from indexcache.distillation.source import open_distillation_source
from indexcache.distillation.training.all_experts import use_all_experts
from indexcache.runs.monitor import TerminalMonitor
from indexcache.runs.versions import stamp

# What may be shipped: the least that the first of these checkpoints had.
TEXT_LOSS, RECALL = 1.83, 0.98
DENSE_LOG = "dense_log.json"
# Of Trainer's log entries, what training_log.json keeps.
LOGGED = ("step", "loss", "lm_loss", "kl", "recall")


def main() -> int:
    """Train, export, score, describe; exit code 1 when the result is not good enough to be shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("windows", help="FILE.safetensors:NAME of test windows")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dense-lm-steps", type=int, default=1989)
    parser.add_argument("--dense-lm-batch", type=int, default=48, help="windows per step")
    parser.add_argument("--dense-lm-rate", type=float, default=3e-3)
    parser.add_argument("--warm-up-steps", type=int, default=132)
    parser.add_argument("--warm-up-rate", type=float, default=3e-3)
    parser.add_argument("--sparse-steps", type=int, default=143)
    parser.add_argument("--sparse-rate", type=float, default=3e-4, help="of all weights but the indexers'")
    parser.add_argument("--indexer-rate", type=float, default=3e-4, help="of the indexers in the sparse stage")
    parser.add_argument("--batch", type=int, default=8, help="windows per step of the last two stages")
    parser.add_argument("--train-windows", type=int, default=32768, help="windows cut from the text")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500, help="steps between two checkpoints to resume from")
    parser.add_argument("--resume", action="store_true", help="continue a stopped run with the same options")
    options = parser.parse_args()
    if options.output.exists() and any(options.output.iterdir()):
        parser.error(f"{options.output} is not empty: give another folder")
    started = time.monotonic()
    work = begin(options, parser)
    windows = work / "train.safetensors"
    if not windows.exists():
        print(
            f"cutting {options.train_windows:,} windows of {options.seqlen:,} tokens from {options.text}", flush=True
        )
        ids = recall_windows(options.text, DEMO, options.train_windows, options.seqlen, options.seed)
        save_file({"train_ids": ids}, work / "train.part")
        (work / "train.part").rename(windows)
    if not (work / "dense").exists():
        train_dense(load_file(windows)["train_ids"], work / "dense", options)
        print(f"dense language model trained, {time.monotonic() - started:.0f} s", flush=True)
    recipe = Recipe(
        dense_steps=options.warm_up_steps,
        sparse_steps=options.sparse_steps,
        dense_learning_rate=options.warm_up_rate,
        learning_rate=options.sparse_rate,
        indexer_learning_rate=options.indexer_rate,
        batch_size=options.batch,
        gradient_checkpointing=False,
        save_every=options.save_every,
        seed=options.seed,
    )
    resume = (work / "sparse").exists()
    run = DistillationRun(str(windows), work / "sparse", options.windows, dtype="bfloat16", resume=resume)
    document = run_distillation(open_distillation_source(str(work / "dense")), recipe, run, TerminalMonitor())
    logs = {"dense language model": json.loads((work / DENSE_LOG).read_text())}
    logs |= dict(zip(("indexer warm-up", "sparse"), json.loads((work / "sparse" / LOG_FILE).read_text()).values()))
    seconds = time.monotonic() - started
    shutil.rmtree(work / "finished", ignore_errors=True)
    export(work / "sparse", work / "finished", "transformers")
    log = training_log(options, document, logs, None if options.resume else round(seconds))
    (work / "finished" / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n")
    print("splitting, scoring and describing it", flush=True)
    finish(work / "finished", options.windows)
    (work / "finished").rename(options.output)
    shutil.rmtree(work)
    return verdict(document["scores"]["after"], options.output, seconds)


def training_log(
    options: argparse.Namespace, document: dict[str, Any], logs: dict[str, list[dict[str, Any]]], seconds: int | None
) -> dict[str, Any]:
    """What `training_log.json` holds: machine, options, recipe, scores and every stage's log, without any path.

    `seconds` is None for a run that was stopped in between.
    """
    given = {key: value for key, value in vars(options).items() if key not in ("output", "resume", "save_every")}
    scores = document["scores"]
    return {
        "machine": stamp(),
        "seconds": seconds,
        "options": {key: value.name if isinstance(value, Path) else value for key, value in given.items()}
        | {"windows": Path(options.windows).name},
        **{key: document[key] for key in ("distillation", "data", "versions")},
        "scores": {"untrained indexers": scores["source"], "trained": scores["after"]},
        "stages": {
            stage: [
                {key: entry[key] for key in LOGGED if key in entry} for entry in log if {"loss", "kl"} & entry.keys()
            ]
            for stage, log in logs.items()
        },
    }


def begin(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Path:
    """The folder of what is done so far, which holds the options it is done with."""
    work = options.output.with_name(f"{options.output.name}.work")
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("resume", "save_every")}
    if work.exists() and not options.resume:
        parser.error(f"{work} holds a run that was stopped: go on with --resume, or delete it")
    if work.exists() and json.loads((work / "options.json").read_text()) != settings:
        parser.error(f"{work} was made with other options, see its options.json: give those, or delete it")
    if not work.exists():
        work.mkdir(parents=True)
        (work / "options.json").write_text(json.dumps(settings, indent=1) + "\n")
    return work


def train_dense(ids: torch.Tensor, output: Path, options: argparse.Namespace) -> None:
    """A dense language model: the indexers are there, and wait, because everything is selected."""
    fields = json.loads((DEMO / "config.json").read_text())
    config = load_config(convert_config(fields, None, None, AUTO_MAP, str(DEMO)), str(DEMO))
    set_seed(options.seed)
    model = IndexCacheForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.indexer.index_topk = options.seqlen
        layer.self_attn.indexer.requires_grad_(False)
    use_all_experts(model)
    on_gpu = torch.cuda.is_available()
    checkpoints, unfinished = output.with_suffix(".trainer"), output.with_suffix(".part")
    arguments: dict[str, Any] = dict(
        output_dir=str(checkpoints),
        max_steps=options.dense_lm_steps,
        learning_rate=options.dense_lm_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.dense_lm_steps // 30),
        per_device_train_batch_size=options.dense_lm_batch,
        adam_beta2=0.95,
        weight_decay=0.01,
        bf16=True,
        seed=options.seed,
        logging_steps=50,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=1,
        report_to=[],
        remove_unused_columns=False,
        dataloader_drop_last=True,
        use_cpu=not on_gpu,
        disable_tqdm=True,
    )
    use_cache = model.config.use_cache
    trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=TrainingWindows(ids))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.exists() else None)
    (output.parent / DENSE_LOG).write_text(json.dumps(trainer.state.log_history))
    # Trainer turned it off: training forwards would make caches that nobody reads.
    model.config.use_cache = use_cache
    model.to("cpu").save_pretrained(unfinished)
    for path in (*DEMO.glob("tokenizer*"), DEMO / "generation_config.json"):
        shutil.copy(path, unfinished / path.name)
    fields = json.loads((unfinished / "config.json").read_text())
    (unfinished / "config.json").write_text(json.dumps({**fields, "dtype": "float32"}, indent=2))
    unfinished.rename(output)
    shutil.rmtree(checkpoints, ignore_errors=True)


def verdict(scores: dict[str, Any], output: Path, seconds: float) -> int:
    """Say whether the result may be shipped."""
    recall = scores.get("recall_accuracy") or 0.0
    good = scores["text_loss"] <= TEXT_LOSS and recall >= RECALL
    print(
        f"{output}: text loss {scores['text_loss']:.4f} (at most {TEXT_LOSS}), recall {recall:.4f} (at least {RECALL})"
        f", {seconds:.0f} s: {'good enough to be shipped' if good else 'not good enough to be shipped'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
