"""A search's result in the terminal: what `indexcache search` prints last, and `indexcache inspect patterns.json`."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ..configuration.share_pattern import FULL

# Full layers stand out from shared ones; the layer that fell to get here is named beside them.
_FULL_STYLE, _SHARED_STYLE = "bold white on blue", "dim"


def draw_result(document: dict[str, Any]) -> RenderableType:
    """Every pattern of a result, layer by layer, with its scores on the held-out windows.

    Args:
        document: of `result.result_document`.
    """
    steps = {step["full_layers"]: step for step in document["steps"]}
    scores = {entry["full_layers"]: entry for entry in document["curve"] if entry["method"] == "search"}
    start = scores.get(document["source"]["pattern"].count(FULL), {}).get("held_out")
    table = Table(
        "full layers",
        Column("pattern", overflow="fold", min_width=min(32, document["num_layers"])),
        Column("now shared", justify="right"),
        Column("held-out loss", justify="right"),
        Column("rise", justify="right"),
        Column("recall", justify="right"),
        title=Text(f"Patterns of {document['source']['name']}"),
        title_justify="left",
    )
    for count, pattern in sorted(document["patterns"].items(), key=lambda item: -int(item[0])):
        found = scores.get(int(count), {}).get("held_out", {})
        step = steps.get(int(count))
        # Refinement may have left the path: then no single layer fell.
        fell = str(step["layer"]) if step and step["pattern"] == pattern else ""
        mark = " *" if int(count) == document.get("keep") else ""
        table.add_row(
            f"{count}{mark}",
            _cells(pattern),
            fell,
            f"{found['loss']:.4f}" if found else "",
            f"{found['loss'] / start['loss'] - 1:+.2%}" if found and start else "",
            f"{found['recall']:.3f}" if "recall" in found else "",
            style="bold" if int(count) in document["asked_for"] else None,
        )
    data = document["data"]
    taught = f" to {document['teacher']} attention's predictions" if document.get("teacher") == "dense" else ""
    lines = [
        f"bold: asked for{'; *: chosen' if 'keep' in document else ''}; {document['recipe']['algorithm']}, "
        f"{document['recipe']['objective']}{taught}, {document['cost']['search_layer_forwards']:,} layer-forwards",
        f"calibration {_data(data['calibration'])}; held out {_data(data['held_out'])}; {document['date']}",
    ]
    lines += _refused(document)
    return Group(table, *map(Text, lines))


def draw_summary(document: dict[str, Any]) -> RenderableType:
    """The patterns asked for, with their held-out scores beside the start's and the baselines'."""
    # A pattern cut short is worth nothing: on a narrow terminal it goes over several lines.
    pattern = Column("pattern", overflow="fold", min_width=min(32, document["num_layers"]))
    table = Table("full layers", "method", pattern, "held-out loss", "rise", "recall")
    start = next(entry for entry in document["curve"] if entry["pattern"] == document["source"]["pattern"])
    counts = {start["full_layers"], *document["asked_for"], document.get("keep")}
    for entry in sorted(document["curve"], key=lambda entry: -entry["full_layers"]):
        is_start = entry["pattern"] == start["pattern"]
        if entry["full_layers"] not in counts or "held_out" not in entry or (is_start and entry is not start):
            continue
        scores = entry["held_out"]
        table.add_row(
            f"{entry['full_layers']}/{document['num_layers']}",
            "source" if is_start else entry["method"],
            entry["pattern"],
            f"{scores['loss']:.4f}",
            f"{scores['loss'] / start['held_out']['loss'] - 1:+.2%}",
            f"{scores['recall']:.3f}" if "recall" in scores else "",
        )
    cost = document["cost"]
    lines = [
        f"{cost['search_layer_forwards']:,} layer-forwards to search, {cost['held_out_layer_forwards']:,} to check",
    ]
    if "keep" in document:
        lines.insert(0, f"chosen: {document['keep']} full layers, {document['index_share_pattern']}")
    lines += _refused(document)
    return Group(table, *map(Text, lines))


def _refused(document: dict[str, Any]) -> list[str]:
    found = document.get("retrieval", {})
    return [
        f"not chosen: {entry['pattern']}, within the tolerance by its loss of {entry['loss']:.4f}, recalls "
        f"{entry['recall']:.1%} where {found['needed']:.1%} is needed"
        for entry in found.get("refused", [])
    ]


def _cells(pattern: str) -> Text:
    text = Text()
    for letter in pattern:
        text.append(letter, style=_FULL_STYLE if letter == FULL else _SHARED_STYLE)
    return text


def _data(data: dict[str, Any]) -> str:
    return f"{data['windows']} windows of {data['seqlen']:,} tokens ({data['origin']})"
