"""Pictures and a self-contained HTML page beside a search's `patterns.json`."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from ..configuration.share_pattern import FULL
from ..runs.pages.figures import draw_overlap
from ..runs.pages.page import facts, picture, table, write_page
from .figures import draw_curve, draw_order
from .result import PATTERNS_FILE, REPORT_FILE


def write_report(document: dict[str, Any], folder: Path) -> Path:
    """Draw the pictures and write the page.

    Args:
        document: of `result.result_document`.
        folder: where `patterns.json` lies.

    Returns:
        The page's path.
    """
    pictures = [("Loss by number of full layers", "curve.png"), ("Order in which layers become shared", "order.png")]
    draw_curve(document, folder / "curve.png")
    draw_order(document, folder / "order.png")
    overlap = document.get("overlap")
    if overlap:
        draw_overlap(overlap["layers"], overlap["matrix"], folder / "overlap.png")
        pictures.append(("Overlap of the layers' selections", "overlap.png"))
    parts = [
        *(f"<p class=warning>{escape(text)}</p>" for text in document.get("warnings", [])),
        _chosen(document),
        "<h2>Patterns</h2>",
        _table(document),
        *_retrieval(document),
        *(picture(title, folder / name) for title, name in pictures),
        "<h2>Recipe</h2>",
        _recipe(document),
        f"<p>All figures: <code>{PATTERNS_FILE}</code></p>",
    ]
    return write_page(f"Share patterns of {document['source']['name']}", parts, folder / REPORT_FILE)


def _chosen(document: dict[str, Any]) -> str:
    if "keep" not in document:
        return ""
    tolerance = document["recipe"]["tolerance"]
    why = "" if tolerance is None else f", the fewest within {tolerance:.2%} of the start's held-out loss"
    needed = document.get("retrieval", {}).get("needed")
    if why and needed is not None:
        why += f" that recall at least {needed:.1%} of what is marked"
    return f"<p>Chosen: {document['keep']} full layers{why}: <code>{document['index_share_pattern']}</code></p>"


def _retrieval(document: dict[str, Any]) -> list[str]:
    """Which patterns the tolerance would have chosen by loss, and why it did not."""
    found = document.get("retrieval")
    if found is None:
        return []
    about = f"{found['windows']} windows of {found['seqlen']:,} tokens, {found['origin']}"
    if found.get("needed") is None:
        judged = f"The source recalls {found['source']:.1%} of what is marked, too little to hold patterns to."
        return ["<h2>Retrieval</h2>", f"<p>{escape(judged)} ({escape(about)})</p>"]
    rows: list[list[object]] = [
        [pattern.count(FULL), pattern, f"{recall:.1%}", "yes" if recall >= found["needed"] else "no"]
        for pattern, recall in sorted(found["patterns"].items(), key=lambda item: -item[0].count(FULL))
    ]
    refused = [
        f"<p class=warning><code>{entry['pattern']}</code>: its held-out loss of {entry['loss']:.4f} is within the "
        f"tolerance, and it recalls {entry['recall']:.1%} where {found['needed']:.1%} is needed: not chosen.</p>"
        for entry in found["refused"]
    ]
    needs = (
        f"<p>Needed: {found['needed']:.1%} of the marked tokens; the source recalls {found['source']:.1%} "
        f"({escape(about)}).</p>"
    )
    return ["<h2>Retrieval</h2>", needs, table(["full layers", "pattern", "recall", "enough"], rows, []), *refused]


def _table(document: dict[str, Any]) -> str:
    start = document["source"]["pattern"]
    entries = [entry for entry in document["curve"] if "held_out" in entry]
    entries = [entry for entry in entries if entry["method"] == "search" or entry["pattern"] != start]
    entries.sort(key=lambda entry: (-entry["full_layers"], entry["method"] != "search"))
    asked = {*document["asked_for"], document.get("keep")}
    rows: list[list[object]] = []
    marked: list[int] = []
    for entry in entries:
        scores = (entry["held_out"]["loss"], entry["held_out"].get("recall"), entry.get("calibration", {}).get("kl"))
        if entry["full_layers"] in asked and entry["method"] == "search":
            marked.append(len(rows))
        numbers = ["" if value is None else f"{value:.4f}" for value in scores]
        method = "source" if entry["pattern"] == start else entry["method"]
        rows.append([entry["full_layers"], method, entry["pattern"], *numbers])
    return table(["full layers", "method", "pattern", "held-out loss", "recall", "calibration KL"], rows, marked)


def _recipe(document: dict[str, Any]) -> str:
    values = {**document["recipe"], **document["cost"], **document["versions"]}
    for name, data in document["data"].items():
        values[name] = (
            f"{data['windows']} windows of {data['seqlen']} tokens, {data['origin']}, sha256 {data['sha256'][:16]}"
        )
    values["source sha256"] = document["source"]["sha256"][:16]
    return facts(values)
