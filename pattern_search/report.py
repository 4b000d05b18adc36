"""Pictures and a self-contained HTML page beside a search's `patterns.json`."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation.figures import draw_overlap
from .figures import draw_curve, draw_order
from .result import PATTERNS_FILE, REPORT_FILE

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: left;
border-bottom: 1px solid #e3e6ea } td.n { text-align: right; font-variant-numeric: tabular-nums }
code { font: 13px ui-monospace, monospace } img { max-width: 100% } .asked { background: #eef4fb }
.warning { border: 2px solid #c0392b; padding: .5rem 1rem } h2 { margin-top: 2.2rem }
"""


def write_report(document: dict[str, Any], folder: Path) -> Path:
    """Draw the pictures and write the page.

    Args:
        document: of `result.result_document`.
        folder: where `patterns.json` lies.

    Returns:
        The page's path.
    """
    pictures = [("Loss by number of full layers", "curve.png"), ("Order in which layers fell", "order.png")]
    draw_curve(document, folder / "curve.png")
    draw_order(document, folder / "order.png")
    overlap = document.get("overlap")
    if overlap:
        draw_overlap(overlap["layers"], overlap["matrix"], folder / "overlap.png")
        pictures.append(("Overlap of the layers' selections", "overlap.png"))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(document['source']['name'])}: share patterns</title><style>{_STYLE}</style>",
        f"<h1>Share patterns of {escape(document['source']['name'])}</h1>",
        *(f"<p class=warning>{escape(text)}</p>" for text in document.get("warnings", [])),
        _chosen(document),
        _table(document),
    ]
    for title, name in pictures:
        image = base64.b64encode((folder / name).read_bytes()).decode()
        parts.append(f"<h2>{title}</h2><img alt='{title}' src='data:image/png;base64,{image}'>")
    parts.append(_recipe(document))
    path = folder / REPORT_FILE
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


def _chosen(document: dict[str, Any]) -> str:
    if "keep" not in document:
        return ""
    tolerance = document["recipe"]["tolerance"]
    why = "" if tolerance is None else f", the fewest within {tolerance:.2%} of the start's held-out loss"
    return f"<p>Chosen: {document['keep']} full layers{why}: <code>{document['index_share_pattern']}</code></p>"


def _table(document: dict[str, Any]) -> str:
    rows = ["<tr><th>full layers<th>method<th>pattern<th>held-out loss<th>recall<th>calibration KL"]
    asked = {*document["asked_for"], document.get("keep")}
    for entry in sorted(document["curve"], key=lambda entry: (-entry["full_layers"], entry["method"] != "search")):
        checks, calibration = entry.get("held_out", {}), entry.get("calibration", {})
        if not checks:
            continue
        mark = " class=asked" if entry["full_layers"] in asked and entry["method"] == "search" else ""
        rows.append(
            f"<tr{mark}><td class=n>{entry['full_layers']}<td>{entry['method']}<td><code>{entry['pattern']}</code>"
            + "".join(
                f"<td class=n>{'' if value is None else format(value, '.4f')}"
                for value in (checks.get("loss"), checks.get("recall"), calibration.get("kl"))
            )
        )
    return f"<h2>Patterns</h2><table>{''.join(rows)}</table>"


def _recipe(document: dict[str, Any]) -> str:
    facts = {**document["recipe"], **document["cost"], **document["versions"], "date": document["date"]}
    for name, data in document["data"].items():
        facts[name] = (
            f"{data['windows']} windows of {data['seqlen']} tokens, {data['origin']}, sha256 {data['sha256'][:16]}"
        )
    facts["source sha256"] = document["source"]["sha256"][:16]
    rows = "".join(f"<tr><th>{escape(str(name))}<td>{escape(str(value))}" for name, value in facts.items())
    return f"<h2>Recipe</h2><table>{rows}</table><p>All figures: <code>{PATTERNS_FILE}</code></p>"
