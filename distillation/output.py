"""Write what a distillation ends with: an IndexCache checkpoint with its recipe, scores and logs."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..conversion.convert.companion_files import copy_companions
from ..conversion.convert.installed_versions import installed_versions
from ..conversion.convert.journal import RECIPE_FILE
from ..conversion.io.checkpoint import CONFIG_FILE, INDEX_FILE
from ..conversion.io.load_source import filled_weights, refuse_filled_weights
from ..conversion.io.shard_writer import sync_folder, write_json
from ..conversion.publish.card import write_card
from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ..runs.windows.windows import Windows
from .data import TrainingWindows
from .errors import DistillationDiverged
from .recipe import Recipe
from .run_options import DistillationRun
from .source import DistillationSource
from .training.finite import first_not_finite

TRAINING_FOLDER = "training"
LOG_FILE = "training_log.json"
# Models that the held-out windows are scored on, as cards and terminals name them.
SCORED = {"source": "the source", "before": "this pattern, untrained", "after": "this checkpoint"}


def recipe_document(
    source: DistillationSource,
    recipe: Recipe,
    windows: TrainingWindows,
    held_out: Windows | None,
    processes: int,
    dtype: str,
) -> dict[str, Any]:
    """What makes the output, in JSON values that are the same on every machine."""
    opened = source.opened
    config = opened.read_range(CONFIG_FILE, 0, opened.size(CONFIG_FILE))
    return {
        "index_share_pattern": source.pattern.letters,
        "dtype": dtype,
        "distillation": {**recipe.as_dict(), "processes": processes},
        "data": {
            "origin": Path(windows.origin).name if Path(windows.origin).exists() else windows.origin,
            "windows": len(windows),
            "tokens": windows.seqlen,
            "sha256": windows.sha256(),
            "held_out_sha256": None if held_out is None else held_out.sha256(),
        },
        "source": {
            "id": opened.id,
            "revision": opened.revision,
            "model_type": "dense" if source.is_dense else source.config.source_model_type,
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "weights": {name: opened.size(name) for name in _weight_files(source)},
        },
        "versions": installed_versions("indexcache", "torch", "transformers", "accelerate"),
    }


def source_fingerprints(source: DistillationSource) -> list[list[Any]]:
    """Marks that change when the source's weights do, for this machine's journal."""
    return [source.opened.fingerprint(name) for name in _weight_files(source)]


def _weight_files(source: DistillationSource) -> list[str]:
    return [name for name in source.opened.list_files() if name.endswith(".safetensors")]


def write_checkpoint(
    trained: Path,
    source: DistillationSource,
    run: DistillationRun,
    document: dict[str, Any],
    scores: dict[str, Any],
    logs: dict[str, Any],
    score: Callable[[IndexCacheForCausalLM], None],
) -> None:
    """Write the trained weights, code, tokenizer, card, recipe and logs into `run.output`; the config comes last.

    Args:
        trained: the last stage's checkpoint.
        source: for tokenizer and card.
        run: where and in which dtype.
        document: from `recipe_document`.
        scores: of held-out windows, filled up by `score`.
        logs: each stage's.
        score: measures the model as written.
    """
    partial = run.output / TRAINING_FOLDER / "result"
    shutil.rmtree(partial, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = IndexCacheForCausalLM.from_pretrained(
            trained, dtype=source.written_dtype(run.dtype), output_loading_info=True, ignore_mismatched_sizes=True
        )
    refuse_filled_weights(model, filled_weights(info), str(trained))
    _refuse_not_finite(model, trained, run.output)
    model.save_pretrained(partial)
    score(model)
    if not math.isfinite(scores.get("after", {}).get("loss", 0.0)):
        raise DistillationDiverged(
            f"the trained model's loss on the held-out windows is {scores['after']['loss']}: {run.output} is not "
            f"finished; the weights are in {trained}"
        )
    copy_companions(source.opened, partial)
    write_json(partial / LOG_FILE, logs)
    card = None
    if "README.md" in source.opened.list_files():
        size = source.opened.size("README.md")
        card = source.opened.read_range("README.md", 0, size).decode("utf-8", errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_card(
            partial,
            source_card=card,
            source_id=source.opened.id if "/" in source.opened.id else None,
            pattern=source.pattern,
            recipe=document,
            repo_id=run.repo_id,
            topk=source.config.index_topk,
            measured=_measured(scores) or None,
            scores=_own_scores(scores),
            trained=_what_was_trained(document),
        )
    names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
    write_json(partial / RECIPE_FILE, {**document, "scores": scores, "files": sorted({*names, RECIPE_FILE})})
    last = [INDEX_FILE, CONFIG_FILE]
    for name in [*(name for name in [*names, RECIPE_FILE] if name not in last), *last]:
        if (partial / name).exists():
            (run.output / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, run.output / name)
    sync_folder(run.output)


def _refuse_not_finite(model: IndexCacheForCausalLM, trained: Path, output: Path) -> None:
    """DistillationDiverged where a weight is no number in the dtype that is written."""
    name = first_not_finite(model.state_dict().items())
    if name is not None:
        raise DistillationDiverged(
            f"{trained}: {name} is not finite as {str(model.dtype).removeprefix('torch.')}, and {output} is not "
            "finished: if the weights outgrew that dtype, they are there in float32, and `indexcache convert` writes "
            "them with --dtype bfloat16; otherwise train again at lower rates"
        )


def _measured(scores: dict[str, Any]) -> list[dict[str, str]]:
    """Rows for the card."""
    rows = []
    for key, found in ((key, scores[key]) for key in SCORED if key in scores):
        row = {"held-out windows": SCORED[key], "loss": f"{found['loss']:.4f}"}
        recall = found.get("recall_accuracy")
        rows.append(row if recall is None else {**row, "recall": f"{recall:.3f}"})
    return rows


def _own_scores(scores: dict[str, Any]) -> dict[str, float]:
    """What this checkpoint scores, by metric."""
    found = scores.get("after", {})
    named = {"loss": found.get("loss"), "recall": found.get("recall_accuracy")}
    return {metric: float(value) for metric, value in named.items() if value is not None}


def _what_was_trained(document: dict[str, Any]) -> str:
    recipe, data = document["distillation"], document["data"]
    step = recipe["batch_size"] * recipe["accumulation"] * recipe["processes"] * data["tokens"]
    trained = "all weights"
    if recipe["lora_rank"] is not None:
        trained = f"the indexers and of adapters of rank {recipe['lora_rank']}, merged"
    stages = []
    if recipe["dense_steps"]:
        stages.append(f"{recipe['dense_steps']:,} warm-up steps of the indexers alone")
    if recipe["sparse_steps"]:
        stages.append(f"{recipe['sparse_steps']:,} sparse steps of {trained}")
    return f"by multi-layer distillation: {' and '.join(stages)}, {step:,} tokens each"
