"""What the pictures of evaluation and search have in common, and the heatmap of overlaps."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, BLUE, ORANGE, GREY, PALE = "#1b1f24", "#1f5fa8", "#d1622b", "#9a9fa6", "#e9edf2"
# Of lines that are told apart, in order.
LINES = (BLUE, ORANGE, GREY, "#2e8b57", "#8e5ea2", INK)


def draw_overlap(layers: list[int], matrix: list[list[float]], path: Path) -> None:
    """The overlap heatmap."""
    size = 3.4 + 0.09 * len(layers)
    figure, axis = plt.subplots(figsize=(size + 0.8, size))
    image = axis.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
    every = max(1, len(layers) // 16)
    axis.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
    axis.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
    axis.set_xlabel("layer")
    axis.set_ylabel("layer")
    figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03, label="|A ∩ B| / k")
    save(figure, path)


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
