"""Draw docs/images/forward_paths.png, the picture of architecture.md: `python docs/draw_paths.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

INK, QUIET, LINE = "#222222", "#555555", "#888888"
BLUE, ORANGE, GREEN, PLAIN = "#dcebf7", "#fbe3d3", "#d9f0e7", "#f3f3f3"

# x, y, width, height, colour, title, lines
BOXES = (
    (
        22,
        90,
        56,
        9,
        PLAIN,
        "IndexCacheModel.forward",
        ("embeddings, cache, options; an unknown option raises",),
    ),
    (
        2,
        67,
        30,
        14,
        ORANGE,
        "differentiable",
        ("with gradients, torch.compile", "or autocast: module by module,", "as transformers' own models run"),
    ),
    (
        35,
        67,
        30,
        14,
        BLUE,
        "streamed",
        (
            "without gradient: in blocks of tokens,",
            "norms and residuals fused with what",
            "reads them, outputs in place",
        ),
    ),
    (
        68,
        67,
        30,
        14,
        GREEN,
        "recorded",
        (
            "one token on CUDA, a cache that stays",
            "where it is: the streamed layers",
            "captured once, then replayed",
        ),
    ),
    (2, 53, 96, 5, PLAIN, "", ("every layer:  (hidden, selection, plan)  \u2192  (hidden, selection, report)",)),
    (2, 37, 47, 11, PLAIN, "F layer", ("its lightning indexer scores every visible key", "and makes a new selection")),
    (51, 37, 47, 11, PLAIN, "S layer", ("no indexer: takes the selection", "of the nearest F layer before it")),
    (
        2,
        13,
        22.5,
        14,
        PLAIN,
        "eager",
        ('backend "eager", or dropout:', "mask of the selected keys,", "attention weights"),
    ),
    (26.5, 13, 22.5, 14, PLAIN, "dense, expanded", ("every key selected,", "many queries:", "heads expanded, S x T")),
    (51, 13, 22.5, 14, PLAIN, "dense, absorbed", ("every key selected,", "few queries:", "on the latents, S x T")),
    (75.5, 13, 22.5, 14, PLAIN, "sparse, absorbed", ("more than top-k keys:", "the selected latents,", "S x K")),
    (
        2,
        2,
        96,
        5,
        PLAIN,
        "",
        ("kernels: one dispatch per operation; Hopper (Gluon), Triton, PyTorch: the first that takes the arguments",),
    ),
)
# from, to
ARROWS = (
    ((36, 90), (18, 81.6)),
    ((50, 90), (50, 81.6)),
    ((64, 90), (82, 81.6)),
    *(((x, 67), (x, 58.6)) for x in (17, 50, 83)),
    *(((x, 53), (x, 48.6)) for x in (25.5, 74.5)),
    *(((x, 37), (x, 27.6)) for x in (13.2, 37.7, 62.2, 86.7)),
    *(((x, 13), (x, 7.6)) for x in (13.2, 37.7, 62.2, 86.7)),
)
NOTES = (
    (24, 86.6, "ForwardPlan.of asks eligibility.py", "right"),
    (76, 86.6, "a plain decoding step", "left"),
    (50, 32.6, "Selection: every key, indices, or merged lists", "center"),
)


def draw(path: Path) -> None:
    """Write the picture."""
    figure, axes = plt.subplots(figsize=(10.4, 7.9), dpi=150)
    for x, y, width, height, colour, title, lines in BOXES:
        shape = "round,pad=0,rounding_size=1.2"
        axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, edgecolor=LINE, linewidth=0.8)
        )
        middle, top = x + width / 2, y + height - 2.5
        if title:
            axes.text(middle, top, title, ha="center", va="center", fontsize=10.5, color=INK, fontweight="bold")
            top -= 3.6
        for row, line in enumerate(lines):
            axes.text(middle, top - 2.8 * row, line, ha="center", va="center", fontsize=8.2, color=QUIET)
    for start, end in ARROWS:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": LINE, "linewidth": 0.9})
    for x, y, text, side in NOTES:
        label = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
        axes.text(x, y, text, ha=side, va="center", fontsize=8.4, color=INK, style="italic", bbox=label)
    axes.set_xlim(-3, 103)
    axes.set_ylim(1, 100)
    axes.set_axis_off()
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("images") / "forward_paths.png")
