"""Draw docs/pattern.png, the README's picture: `python docs/draw_pattern.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from indexcache.configuration.share_pattern import SharePattern

# The 30B model of the IndexCache paper (arXiv 2603.12201): appendix B, and the long-context averages of its table 2.
SEARCHED = SharePattern("FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS")
ROWS = (
    ("searched", SEARCHED, "49.9"),
    ("evenly spaced", SharePattern.uniform(len(SEARCHED), SEARCHED.num_full), "43.0"),
)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
INK, QUIET = "#222222", "#666666"


def draw(path: Path) -> None:
    """Write the picture."""
    layers = len(SEARCHED)
    figure, axes = plt.subplots(figsize=(12.6, 2.35), dpi=160)
    for row, (name, pattern, score) in enumerate(ROWS):
        y = -1.55 * row
        groups = {full: COLOURS[i % len(COLOURS)] for i, full in enumerate(pattern.groups)}
        for layer in range(layers):
            colour = groups[pattern.source_of(layer)]
            full = pattern.is_full(layer)
            axes.add_patch(
                FancyBboxPatch(
                    (layer + 0.08, y + 0.08),
                    0.84,
                    0.84,
                    boxstyle="round,pad=0,rounding_size=0.16",
                    facecolor=colour,
                    alpha=1.0 if full else 0.22,
                    edgecolor="none",
                )
            )
            axes.text(
                layer + 0.5,
                y + 0.48,
                pattern.letters[layer],
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if full else INK,
                fontweight="bold" if full else "normal",
            )
        axes.text(-0.5, y + 0.5, name, ha="right", va="center", fontsize=10.5, color=INK)
        axes.text(layers + 0.6, y + 0.5, score, ha="left", va="center", fontsize=10.5, color=INK, fontweight="bold")
    for layer in range(0, layers, 5):
        axes.text(layer + 0.5, -2.0, str(layer), ha="center", va="center", fontsize=8, color=QUIET)
    axes.text(-0.5, -2.0, "layer", ha="right", va="center", fontsize=8, color=QUIET)
    axes.text(layers + 0.6, 1.5, "long-context\nscore", ha="left", va="center", fontsize=8, color=QUIET)
    axes.text(
        -0.5 + 0.5,
        1.5,
        "F runs its lightning indexer; S of the same colour reuses what it selected (12 of 47 layers run one)",
        ha="left",
        va="center",
        fontsize=9.5,
        color=QUIET,
    )
    axes.set_xlim(-7.2, layers + 4.6)
    axes.set_ylim(-2.4, 2.1)
    axes.set_axis_off()
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("pattern.png"))
