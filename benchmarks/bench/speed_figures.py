"""Pictures of a run: speed-ups by context length beside the paper's, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .speed_parts import PARTS

# A "$" in a model's name is one.
matplotlib.rcParams["text.parse_math"] = False

# IndexCache, table 1: a 30B model in SGLang on 8 H100; seconds, tokens a second a request, tokens a second a GPU.
PAPER: dict[str, dict[str, dict[int, float]]] = {
    "prefill": {
        "all full": {10_000: 0.57, 60_000: 3.38, 120_000: 8.57, 200_000: 19.5},
        "1/2": {10_000: 0.47, 60_000: 2.86, 120_000: 6.57, 200_000: 13.7},
        "1/4": {10_000: 0.45, 60_000: 2.59, 120_000: 5.66, 200_000: 10.7},
    },
    "decode": {
        "all full": {10_000: 73.5, 60_000: 67.0, 120_000: 63.0, 200_000: 58.0},
        "1/2": {10_000: 84.5, 60_000: 80.0, 120_000: 77.0, 200_000: 73.0},
        "1/4": {10_000: 91.0, 60_000: 89.5, 120_000: 88.0, 200_000: 86.0},
    },
    "full cache": {
        "all full": {10_000: 2700, 60_000: 613, 120_000: 341, 200_000: 197},
        "1/2": {10_000: 3070, 60_000: 750, 120_000: 431, 200_000: 253},
        "1/4": {10_000: 3310, 60_000: 840, 120_000: 498, 200_000: 297},
    },
}
_TITLES = {"prefill": "prefill", "decode": "decode, one request", "full cache": "decode, full cache"}
_COLOURS = ("#1f5fa8", "#d1622b", "#2e8b57", "#8a4fa3", "#9a9fa6")
_PART_COLOURS = dict(zip(PARTS, ("#d1622b", "#e9a178", "#1f5fa8", "#2e8b57", "#8fb8de", "#c9ced6")))
_INK = "#1b1f24"


def speed_ups(document: dict[str, Any], kind: str) -> dict[str, list[tuple[int, float]]]:
    """By pattern, `(tokens, times as fast as the first pattern)`, in order of tokens; ours alone.

    `kind` is prefill, decode or full cache. Of several ways or batch sizes the fastest counts.
    """
    base, *others = document["patterns"]
    value = "prefill_seconds" if kind == "prefill" else "tokens_per_second"
    found: dict[tuple[str, int], float] = {}
    for row in document["rows"]:
        of_kind = row["kind"] == ("full cache" if kind == "full cache" else "generate")
        if of_kind and row["model"] == "indexcache" and value in row and not (row.get("input") or row.get("indexer")):
            speed = 1 / row[value] if kind == "prefill" else row[value]
            key = row["pattern"], row["tokens"]
            found[key] = max(found.get(key, 0.0), speed)
    lines: dict[str, list[tuple[int, float]]] = {}
    for name in others:
        points = [(n, speed / found[base, n]) for (p, n), speed in found.items() if p == name and (base, n) in found]
        if points:
            lines[name] = sorted(points)
    return lines


def paper_speed_ups(kind: str) -> dict[str, list[tuple[int, float]]]:
    """The same of the paper's table."""
    table = PAPER[kind]
    base = table["all full"]
    ratio = (lambda n, x: base[n] / x) if kind == "prefill" else (lambda n, x: x / base[n])
    return {p: [(n, ratio(n, x)) for n, x in row.items()] for p, row in table.items() if p != "all full"}


def draw_speed_ups(document: dict[str, Any], path: Path) -> bool:
    """One panel each for prefill, decode and decode with a full cache; False when there is nothing to draw."""
    panels = {kind: lines for kind in _TITLES if (lines := speed_ups(document, kind))}
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.7), squeeze=False)
    names = list(document["patterns"])[1:]
    for axis, (kind, lines) in zip(axes[0], panels.items()):
        for i, name in enumerate(names):
            colour = _COLOURS[i % len(_COLOURS)]
            if name in lines:
                axis.plot(*zip(*lines[name]), color=colour, marker="o", markersize=4, label=name)
            paper = paper_speed_ups(kind).get(name)
            if paper and document["shape"] == "30b" and document["source"] is None:
                style: dict[str, Any] = dict(linestyle="--", linewidth=1.2, marker="x", markersize=4)
                axis.plot(*zip(*paper), color=colour, label=f"{name}, paper", **style)
        axis.axhline(1.0, color=_INK, linewidth=0.8)
        axis.set_title(_TITLES[kind], fontsize=10, loc="left", color=_INK)
        axis.set_xlabel("context (tokens)")
        ticks = sorted({row["tokens"] for row in document["rows"]})
        axis.set_xticks(ticks, [_short(n) for n in ticks])
        axis.set_ylim(bottom=min(0.9, *(y for points in lines.values() for _, y in points)))
        _plain(axis)
    axes[0][0].set_ylabel(f"times as fast as {next(iter(document['patterns']))}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="upper center", ncols=min(6, len(labels)), fontsize=9)
    _save(figure, path, top=0.9)
    return True


def draw_parts(document: dict[str, Any], path: Path) -> bool:
    """A bar a row: milliseconds by part; prefill and decode side by side. False when there is nothing to draw."""
    rows = [row for row in document["rows"] if row["kind"] == "parts" and "milliseconds" in row]
    ways = [way for way in ("prefill", "decode") if any(row["way"] == way for row in rows)]
    if not ways:
        return False
    longest = max(sum(row["way"] == way for row in rows) for way in ways)
    figure, axes = plt.subplots(1, len(ways), figsize=(5.4 * len(ways), 1.5 + 0.5 * longest), squeeze=False)
    for axis, way in zip(axes[0], ways):
        bars = [row for row in rows if row["way"] == way][::-1]
        left = [0.0] * len(bars)
        for part in PARTS:
            values = [row["milliseconds"].get(part, 0.0) for row in bars]
            if any(values):
                axis.barh(range(len(bars)), values, left=left, color=_PART_COLOURS[part], label=part, height=0.62)
            left = [a + b for a, b in zip(left, values)]
        axis.set_yticks(range(len(bars)), [f"{row['pattern']}, {_short(row['tokens'])}" for row in bars], fontsize=9)
        axis.set_xlabel(f"ms of one {'prefill' if way == 'prefill' else 'decoding step'}")
        _plain(axis)
    named = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels()) if label in PARTS
    }
    shown = [part for part in PARTS if part in named]
    figure.legend([named[p] for p in shown], shown, frameon=False, loc="upper center", ncols=len(shown), fontsize=9)
    _save(figure, path, top=0.86)
    return True


def _short(tokens: int) -> str:
    return f"{round(tokens / 1000)}K" if tokens >= 1000 else str(tokens)


def _plain(axis: Axes) -> None:
    axis.grid(color="#e3e6ea", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure: Figure, path: Path, top: float) -> None:
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
