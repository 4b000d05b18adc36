"""Tables of a run for the terminal and a self-contained page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from ...runs.pages.page import facts, picture, table, write_page
from .speed_parts import PARTS

REPORT_FILE = "report.html"
Table = tuple[str, list[str], list[list[str]]]


def tables(document: dict[str, Any]) -> list[Table]:
    """`(title, column names, rows)` of everything measured; the first column names the row."""
    names, rows = list(document["patterns"]), document["rows"]
    found: list[Table] = []
    for model in ("indexcache", "transformers"):
        theirs = " (transformers' own glm_moe_dsa)" if model == "transformers" else ""
        for kind, value, title, digits in (
            ("generate", "prefill_seconds", "Prefill, seconds to the first token", 3),
            ("generate", "tokens_per_second", "Decode, tokens per second, batch 1", 1),
            ("generate", "peak_gib", "Peak memory, GiB", 1),
            ("full cache", "tokens_per_second", "Decode with a full cache, tokens per second", 1),
        ):
            chosen = [row for row in rows if row["kind"] == kind and row["model"] == model]
            if any(value in row for row in chosen):
                found.append(_table(title + theirs, chosen, names, value, digits))
    parts = [row for row in rows if row["kind"] == "parts" and "milliseconds" in row]
    if parts:
        used = [part for part in PARTS if any(row["milliseconds"].get(part) for row in parts)]
        for way in dict.fromkeys(row["way"] for row in parts):
            lines = [
                [f"{row['tokens']:,}, {row['pattern']}"]
                + [f"{row['milliseconds'].get(part, 0.0):.2f}" for part in used]
                + [f"{sum(row['milliseconds'].values()):.2f}"]
                for row in parts
                if row["way"] == way
            ]
            found.append((f"Where the time goes, ms of one {way}", ["tokens", *used, "sum"], lines))
    overlaps = [row for row in rows if row["kind"] == "overlap" and row.get("layers")]
    if overlaps:
        columns = ["", "least", "most", "union of 4, most"]
        lines = [
            [f"{row['tokens']:,}" + f", {row['input']} tokens" * bool(row.get("input"))]
            + [f"{value:.2f}" for value in (min(row["layers"]), max(row["layers"]), max(row["unions_of_4"]))]
            for row in overlaps
        ]
        found.append(("Share of its keys that a query has in common with the one before", columns, lines))
    return found


def _table(title: str, rows: list[dict[str, Any]], names: list[str], value: str, digits: int) -> Table:
    """Lengths (and ways or batch sizes) down, patterns across, and how many times the first pattern's speed."""
    cells = {(*_key(row), row["pattern"]): row for row in rows}
    keys = sorted({key[:-1] for key in cells})
    several_ways = len({way for _, way, *_ in keys}) > 1
    several_batches = len({batch for *_, batch, _, _ in keys}) > 1
    lines = []
    for key in keys:
        tokens, way, batch, given, indexer = key
        label = f"{tokens:,}" + (f", {way}" if several_ways else "") + (f", batch {batch or 'most'}" * several_batches)
        label += f", {given} tokens" * bool(given) + f", indexer in {indexer}" * bool(indexer)
        line = [label]
        first = cells.get((*key, names[0]), {}).get(value)
        for name in names:
            row = cells.get((*key, name), {})
            text = "out of memory" if "out_of_memory" in row else ""
            if value in row:
                text = f"{row[value]:.{digits}f}"
                if first and name != names[0] and value in ("prefill_seconds", "tokens_per_second"):
                    ratio = first / row[value] if value == "prefill_seconds" else row[value] / first
                    text += f" ({ratio:.2f}x)"
            line.append(text)
        lines.append(line)
    return title, ["tokens", *names], lines


def _key(row: dict[str, Any]) -> tuple[int, str, int, str, str]:
    return row["tokens"], row["way"], row["batch"], row.get("input", ""), row.get("indexer", "")


def write_report(document: dict[str, Any], pictures: list[tuple[str, Path]], path: Path) -> None:
    """Everything in one HTML file."""
    names = ("dtype", "backend", "layers", "routed_experts", "input")
    parts = [
        facts({**{name: document[name] for name in names}, **document["versions"]}),
        *(picture(title, file) for title, file in pictures),
        *(f"<h2>{escape(title)}</h2>{table(columns, lines)}" for title, columns, lines in tables(document)),
        "<h2>Patterns</h2>" + table(["name", "pattern"], document["patterns"].items()),
    ]
    write_page(f"Speed of {document['what']}", parts, path)
