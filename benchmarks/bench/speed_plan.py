"""What `indexcache bench` measures in which order: rows, and plans that spell them out in a JSON file."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runs.errors import RunError

OURS, PEER = "indexcache", "transformers"
KINDS = ("generate", "full cache", "parts", "overlap")
_WAYS = {"generate": ("static", "dynamic"), "parts": ("prefill", "decode"), "full cache": ("",), "overlap": ("",)}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kind: one of `KINDS`.
        model: `OURS` or `PEER`.
        tokens: context length.
        pattern: its name.
        way: the cache of generate, or what is broken down into parts.
        batch: sequences in a full cache; 0: as many as fit.
        input: `drift` or `random` where it is not the run's own.
        repeats: calls of generate where they are not the run's own number.
        indexer: `e4m3` for products of the indexer in e4m3 (`indexer_fp8`), or as the model has them.
    """

    kind: str
    model: str
    tokens: int
    pattern: str
    way: str = ""
    batch: int = 1
    input: str = ""
    repeats: int = 0
    indexer: str = ""


def read_plan(path: Path) -> list[Row]:
    """Rows of a plan file, in its order.

    The file is `{"rows": [entry, ...]}`. An entry has `kind`, `tokens` and `patterns` (lists, every pair of them in
    that order), and may have `model`, `way` (one or a list), `batch`, `input`, `repeats` and `indexer`, as `Row`.

    Raises:
        RunError: a file that cannot be read or an entry that makes no sense, naming it.
    """
    try:
        entries = list(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f'--plan {path} is not a JSON file of {{"rows": [...]}}: {error!r}') from error
    rows: list[Row] = []
    for number, entry in enumerate(entries):
        try:
            rows += _rows_of(entry)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise RunError(f"--plan {path}, entry {number} ({json.dumps(entry)}): {error!r}") from error
    return list(dict.fromkeys(rows))


def _rows_of(entry: dict[str, Any]) -> list[Row]:
    known = {"kind", "model", "tokens", "patterns", "way", "batch", "input", "repeats", "indexer"}
    if unknown := set(entry) - known:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    kind, model = entry["kind"], entry.get("model", OURS)
    if kind not in KINDS or model not in (OURS, PEER) or (model == PEER and kind != "generate"):
        raise ValueError(f"no such measurement: {kind} of {model}")
    first = "dynamic" if model == PEER else _WAYS[kind][0]
    ways = entry.get("way", first if kind == "generate" else list(_WAYS[kind]))
    ways = [ways] if isinstance(ways, str) else ways
    if unknown := set(ways) - set(_WAYS[kind]):
        raise ValueError(f"{kind} has no way {', '.join(sorted(unknown))}")
    if entry.get("input", "") not in ("", "drift", "random"):
        raise ValueError(f"input must be drift or random, not {entry['input']}")
    if entry.get("indexer", "") not in ("", "e4m3") or (model == PEER and entry.get("indexer")):
        raise ValueError(f"indexer must be e4m3, and {PEER} has none, not {entry['indexer']}")
    return [
        Row(
            kind,
            model,
            int(tokens),
            pattern,
            way,
            int(entry.get("batch", 1)),
            entry.get("input", ""),
            int(entry.get("repeats", 0)),
            entry.get("indexer", ""),
        )
        for tokens, pattern, way in itertools.product(entry["tokens"], entry["patterns"], ways)
    ]
