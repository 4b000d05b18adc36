"""The result of a search as one JSON document: what `convert --pattern-file`, `inspect` and the report read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..configuration.share_pattern import FULL, SharePattern
from ..conversion.io.shard_writer import write_json
from ..conversion.io.strict_json import parse_json
from ..runs.errors import RunError
from ..runs.versions import stamp
from ..runs.windows.windows import Windows
from .measure.document_shape import misfit
from .measure.evaluator import Evaluation
from .search import SearchOptions, SearchOutcome, recipe

FORMAT = "indexcache-patterns/1"
# What readers of the document rely on: types, lists of one shape, dicts by key (`?`: may be missing) or of one shape.
_SCORES = {"loss": float, "recall?": float}
_WINDOWS = {"origin": str, "windows": int, "seqlen": int}
_SHAPE = {
    "num_layers": int,
    "patterns": {str: str},
    "index_share_pattern?": str,
    "keep?": int,
    "asked_for": [int],
    "steps": [{"layer": int, "full_layers": int, "pattern": str}],
    "curve": [{"method": str, "full_layers": int, "pattern": str, "held_out?": _SCORES, "calibration?": _SCORES}],
    "recipe": {"algorithm": str, "objective": str},
    "source": {"name": str, "pattern": str},
    "data": {"calibration": _WINDOWS, "held_out": _WINDOWS},
    "date": str,
    "cost": {"search_layer_forwards": int, "held_out_layer_forwards": int},
    "retrieval?": {
        "origin": str,
        "windows": int,
        "seqlen": int,
        "source": float,
        "patterns": {str: float},
        "refused": [{"pattern": str, "loss": float, "recall": float}],
    },
}
PATTERNS_FILE, JOURNAL_FILE, REPORT_FILE = "patterns.json", "journal.jsonl", "report.html"
# Scores that sweeps of streamed layers made before they were asked for.
SWEEPS_FILE = "sweeps.jsonl"


def result_document(
    outcome: SearchOutcome,
    options: SearchOptions,
    calibration: Windows,
    held_out: Windows,
    *,
    source: str,
    identity: dict[str, Any],
    model_type: str | None = None,
) -> dict[str, Any]:
    """Everything about a search as JSON values.

    Args:
        outcome: what was found.
        options: how it was searched.
        calibration: the windows that decided.
        held_out: the windows that checked.
        source: the checkpoint, as reports name it.
        identity: `search_identity`.
        model_type: the family that the checkpoint came from.

    Returns:
        `patterns` by number of full layers, and `index_share_pattern` where one was chosen (by tolerance, or because
        one number was asked for): what `convert --pattern-file` reads. `curve`: scores a number of full layers,
        searched and baselines. `order`: layers in the order in which they fell. `steps`, `recipe`, `source`, `data`,
        `versions`, `cost`, and `retrieval` where a tolerance was judged on it.
    """
    versions = stamp()
    document: dict[str, Any] = {
        "format": FORMAT,
        "num_layers": len(outcome.start),
        "patterns": {str(count): outcome.patterns[count] for count in sorted(outcome.patterns, reverse=True)},
    }
    chosen = outcome.chosen if outcome.chosen is not None else outcome.counts[0] if len(outcome.counts) == 1 else None
    if chosen is not None:
        document |= {"index_share_pattern": outcome.patterns[chosen], "keep": chosen}
    return document | {
        "asked_for": outcome.counts,
        "curve": _curve(outcome),
        "order": [step.layer for step in outcome.steps],
        "steps": [
            {
                "layer": step.layer,
                "full_layers": step.pattern.count(FULL),
                "pattern": step.pattern,
                "cost": step.cost,
                "candidates": {str(layer): cost for layer, cost in step.candidates.items()},
            }
            for step in outcome.steps
        ],
        "recipe": recipe(options),
        "teacher": outcome.teacher,
        **({} if outcome.retrieval is None else {"retrieval": outcome.retrieval}),
        "source": {
            "name": source,
            "model_type": model_type,
            "sha256": identity["model_sha256"],
            "pattern": outcome.start,
        },
        "data": {
            name: {
                "origin": windows.origin,
                "windows": len(windows),
                "seqlen": windows.seqlen,
                "recall_tokens": windows.recall_tokens,
                "sha256": windows.sha256(),
            }
            for name, windows in (("calibration", calibration), ("held_out", held_out))
        },
        "versions": {
            **versions,
            "dtype": identity["dtype"],
            "attention": identity["attention"],
        },
        "date": versions["date"],
        "cost": outcome.cost,
    }


def write_result(document: dict[str, Any], folder: Path) -> Path:
    """Write `patterns.json` to `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PATTERNS_FILE
    write_json(path, document)
    return path


def read_result(path: Path) -> dict[str, Any]:
    """The document that a search wrote.

    Raises:
        RunError: unreadable, of another format, or with a field that is missing or holds something else.
    """
    try:
        document: dict[str, Any] = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is no readable result of a search: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise RunError(f"{path} is no result of a search: its format is not {FORMAT!r}")
    if problem := misfit(document, _SHAPE):
        raise RunError(f"{path} is damaged: {problem}; take the file that the search wrote")
    for count, pattern in document["patterns"].items():
        try:
            found = SharePattern.parse(pattern, document["num_layers"]).num_full
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}; take the file that the search wrote") from error
        if str(found) != count:
            raise RunError(
                f"{path} is damaged: {pattern} does not have {count} full layers; take the file that the search wrote"
            )
    return document


def _curve(outcome: SearchOutcome) -> list[dict[str, Any]]:
    """One entry a pattern: method, full layers, scores on both sets of windows."""
    methods = {"search": outcome.patterns, **outcome.baselines}
    entries = []
    for method, patterns in methods.items():
        for count in sorted(patterns, reverse=True):
            pattern = patterns[count]
            scored = {"calibration": outcome.calibration, "held_out": outcome.held_out}
            scores = {name: _scores(known[pattern]) for name, known in scored.items() if pattern in known}
            if scores:
                entries.append({"method": method, "full_layers": count, "pattern": pattern, **scores})
    return entries


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {"loss": evaluation.loss}
    if evaluation.kl:
        found["kl"] = evaluation.kl
    if evaluation.recall is not None:
        found |= {"recall": evaluation.recall, "recall_loss": evaluation.recall_loss}
    return found
