"""Pictures of a search: scores by number of full layers, and which layers fell when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator

from ..runs.pages.figures import BLUE, GREY, INK, ORANGE, PALE, plain, save

_STYLES = {
    "search": {"color": BLUE, "marker": "o", "linewidth": 2.0, "zorder": 3},
    "uniform": {"color": GREY, "marker": "s", "linewidth": 1.3, "zorder": 2},
    "similarity": {"color": ORANGE, "marker": "^", "linewidth": 1.3, "zorder": 2},
}
_LABELS = {"search": "searched", "uniform": "uniform", "similarity": "similarity DP"}


def draw_curve(document: dict[str, Any], path: Path) -> None:
    """Held-out loss, and recall where tokens are marked, against the number of full layers."""
    lines = curve_lines(document["curve"])
    has_recall = any("recall" in scores for points in lines.values() for _, scores in points)
    figure, axes = plt.subplots(1, 1 + has_recall, figsize=(5.4 * (1 + has_recall), 3.9), squeeze=False)
    for axis, value, label in zip(axes[0], ("loss", "recall"), ("held-out loss (nats per token)", "recall")):
        for method, points in lines.items():
            style: dict[str, Any] = {**_STYLES[method], "label": _LABELS[method], "markersize": 4.5}
            axis.plot([count for count, _ in points], [scores[value] for _, scores in points], **style)
        axis.set_xlabel(f"full layers of {document['num_layers']}")
        axis.set_ylabel(label)
        axis.invert_xaxis()
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2)
        plain(axis)
    axes[0][0].set_ylim(*_loss_range(lines))
    save(figure, path)


def draw_order(document: dict[str, Any], path: Path) -> None:
    """One row a number of full layers: which layers are full, and in orange the one that fell to get there."""
    num_layers = document["num_layers"]
    rows = [{"full_layers": num_layers, "pattern": document["source"]["pattern"], "layer": None}, *document["steps"]]
    cells = [
        [2 if layer == row["layer"] else int(letter == "S") for layer, letter in enumerate(row["pattern"])]
        for row in rows
    ]
    figure, axis = plt.subplots(figsize=(1.4 + 0.3 * num_layers, 1.2 + 0.24 * len(rows)))
    axis.imshow(cells, cmap=ListedColormap([BLUE, PALE, ORANGE]), vmin=0, vmax=2, aspect="auto")
    axis.set_xticks(range(num_layers), [str(layer) for layer in range(num_layers)], fontsize=8)
    axis.set_yticks(range(len(rows)), [str(row["pattern"].count("F")) for row in rows], fontsize=8)
    axis.set_xticks([layer - 0.5 for layer in range(num_layers + 1)], minor=True)
    axis.set_yticks([row - 0.5 for row in range(len(rows) + 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    axis.set_xlabel("layer")
    axis.set_ylabel("full layers")
    axis.set_title("blue: full, grey: shared, orange: became shared in this step", fontsize=9, loc="left", color=INK)
    for side in axis.spines.values():
        side.set_visible(False)
    save(figure, path)


def save_plot(lines: dict[str, list[tuple[int, float]]], x: str, y: str, path: Path) -> None:
    """Labelled lines of points, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(5.6, 3.9))
    for (label, points), colour in zip(lines.items(), (INK, GREY, BLUE, ORANGE)):
        axis.plot([at for at, _ in points], [value for _, value in points], color=colour, marker="o", markersize=4)
        axis.annotate(
            label, points[-1], xytext=(6, 0), textcoords="offset points", va="center", fontsize=8, color=colour
        )
    depths = [at for at, _ in next(iter(lines.values()))]
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(depths, [str(depth) for depth in depths])
    axis.minorticks_off()
    axis.set_xlim(depths[0] * 0.92, depths[-1] * 3.0)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    plain(axis)
    save(figure, path)


def curve_lines(curve: list[dict[str, Any]]) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Held-out scores by method, as points ordered by full layers."""
    lines: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for entry in sorted(curve, key=lambda entry: entry["full_layers"]):
        if "held_out" in entry:
            lines.setdefault(entry["method"], []).append((entry["full_layers"], entry["held_out"]))
    return {method: lines[method] for method in _STYLES if method in lines}


def _loss_range(lines: dict[str, list[tuple[int, dict[str, float]]]]) -> tuple[float, float]:
    """From the least loss to half as much again at most: patterns beyond that are ruined, and leave the picture."""
    everything = [scores["loss"] for points in lines.values() for _, scores in points]
    low = min(everything)
    high = min(max(everything), 1.5 * low)
    margin = 0.05 * (high - low) + 1e-6
    return low - margin, high + margin
