"""Pictures of an evaluation, and what they have in common with those of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# A "$" in a model's name is one.
matplotlib.rcParams["text.parse_math"] = False

INK, BLUE, ORANGE, GREY, PALE = "#1b1f24", "#1f5fa8", "#d1622b", "#9a9fa6", "#e9edf2"
# Of lines in one figure, in order.
LINES = (BLUE, ORANGE, GREY, "#2e8b57", "#8e5ea2", INK)


def draw_overlap(layers: list[int], matrix: list[list[float]], path: Path) -> None:
    """The overlap heatmap of one model."""
    size = 3.4 + 0.09 * len(layers)
    figure, axis = plt.subplots(figsize=(size + 0.8, size))
    _heatmap(figure, axis, layers, matrix)
    save(figure, path)


def draw_overlaps(document: dict[str, Any], labels: list[str], path: Path) -> None:
    """The overlap heatmap of every checkpoint, side by side; patterns of one share it."""
    models = document["models"]
    by_checkpoint = {models[entry["model"]]["sha256"]: entry for entry in reversed(document["overlap"])}
    entries = sorted(by_checkpoint.values(), key=lambda entry: entry["model"])
    size = 3.4 + 0.09 * max(len(entry["layers"]) for entry in entries)
    figure, axes = plt.subplots(1, len(entries), figsize=((size + 0.8) * len(entries), size), squeeze=False)
    for axis, entry in zip(axes[0], entries):
        _heatmap(figure, axis, entry["layers"], entry["matrix"])
        axis.set_title(models[entry["model"]]["name"], fontsize=9, color=INK)
    save(figure, path)


def draw_loss_by_position(document: dict[str, Any], labels: list[str], path: Path) -> None:
    """Mean loss in each part of the windows, a line a column: what context is worth."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0))
    for number, entry in enumerate(document["perplexity"]):
        points = [(part["until"], part["loss"]) for part in entry["by_position"]]
        axis.plot(*zip(*points), label=labels[entry["model"]], **_line(number))
    axis.set_xlabel("tokens into the window (end of each part)")
    axis.set_ylabel("loss (nats per token)")
    _legend(axis, len(document["perplexity"]))
    plain(axis)
    save(figure, path)


def draw_retrieval(document: dict[str, Any], labels: list[str], path: Path) -> None:
    """Answers given by context length, and below a heatmap of length and depth for every column."""
    entries = document["retrieval"]
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure = plt.figure(figsize=(3.3 * max(2, columns), 3.9 + 2.4 * rows))
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.6, *[1.0] * rows])
    axis = figure.add_subplot(grid[0, :])
    for number, entry in enumerate(entries):
        points = [(at["length"], at["accuracy"]) for at in entry["lengths"]]
        axis.plot(*zip(*points), label=labels[entry["model"]], **_line(number))
    lengths = sorted({at["length"] for entry in entries for at in entry["lengths"]})
    axis.set_xscale("log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("answers given")
    _legend(axis, len(entries))
    plain(axis)
    for number, entry in enumerate(entries):
        cell = figure.add_subplot(grid[1 + number // columns, number % columns])
        depths = entry["lengths"][0]["by_depth"]
        values = [[at["by_depth"][row]["accuracy"] for at in entry["lengths"]] for row in range(len(depths))]
        cell.imshow(values, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
        cell.set_xticks(range(len(entry["lengths"])), [f"{at['length']:,}" for at in entry["lengths"]], fontsize=7)
        cell.set_yticks(range(len(depths)), [f"{depth['depth']:.0%}" for depth in depths], fontsize=7)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                ink = "white" if value > 0.6 else INK
                cell.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color=ink)
        cell.set_title(labels[entry["model"]], fontsize=8, color=INK)
        if number % columns == 0:
            cell.set_ylabel("depth", fontsize=8)
        cell.tick_params(length=0)
    save(figure, path)


def _heatmap(figure: Figure, axis: Axes, layers: list[int], matrix: list[list[float]]) -> None:
    image = axis.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
    every = max(1, len(layers) // 16)
    axis.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
    axis.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
    axis.set_xlabel("layer")
    axis.set_ylabel("layer")
    figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03, label="|A ∩ B| / k")


def _line(number: int) -> dict[str, Any]:
    """Thinner from line to line, so that lines that coincide are all seen."""
    return {
        "color": LINES[number % len(LINES)],
        "marker": "osD^vP"[number % 6],
        "markersize": max(3.0, 7.5 - 1.5 * number),
        "linewidth": max(1.0, 3.2 - 0.7 * number),
    }


def _legend(axis: Axes, entries: int) -> None:
    axis.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=min(2, entries),
        borderaxespad=0.2,
        fontsize=8,
    )


def plain(axis: Axes) -> None:
    """A light grid, no frame."""
    axis.grid(color="#e3e6ea", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write and close."""
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
