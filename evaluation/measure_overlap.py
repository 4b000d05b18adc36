"""What `indexcache inspect --overlap` does: a checkpoint and data to the heatmap of its selections."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.text import Text

from ..runs.errors import RunError
from ..runs.loading import Placement, load_model, open_model
from ..runs.streaming.layer_source import stream_model
from ..runs.windows.tokenizer import load_tokenizer
from ..runs.windows.window_sources import Sampling, default_seqlen, read_windows
from .overlap import selection_overlap
from .streamed import streamed_overlap

# From no overlap to full: dark to bright.
_SHADES = ("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725")


def measure_overlap(
    source: str,
    data: str,
    seqlen: int | None,
    nsamples: int,
    picture: Path | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    stream: bool = False,
) -> dict[str, Any]:
    """Run windows of `data` through `source` and compare what its full layers select.

    Args:
        source: a DSA or IndexCache checkpoint: a folder or a Hub id.
        data: see `window_sources.py`.
        seqlen: tokens per window; by default 32 times top-k.
        nsamples: windows.
        picture: where to write the heatmap.
        revision: of a Hub source.
        token: for the Hub.
        stream: take layers from the checkpoint as they are needed, in one sweep for all windows.

    Returns:
        `layers`, `matrix` (rows of |A ∩ B| / k), `adjacent`, `queries`.

    Raises:
        RunError: data that cannot be used, or windows not longer than top-k.
    """
    draw = None if picture is None else _picture_drawer()
    placement = Placement(revision=revision, token=token)
    opened = open_model(source, placement)
    config = opened.config
    sampling = Sampling(seqlen, nsamples)
    tokens = seqlen or default_seqlen(config.max_position_embeddings, config.index_topk)
    windows = read_windows(data, load_tokenizer(opened.source), sampling, tokens, nsamples)
    try:
        if stream:
            with closing(stream_model(opened, placement)) as layers:
                found = streamed_overlap(layers, windows.ids[:, :-1])
        else:
            found = selection_overlap(load_model(opened, placement), windows.ids[:, :-1])
    except ValueError as error:
        raise RunError(str(error)) from error
    matrix = found.matrix.tolist()
    if draw is not None:
        draw(found.layers, matrix, picture)
    return {"layers": found.layers, "matrix": matrix, "adjacent": found.adjacent, "queries": found.queries}


def _picture_drawer() -> Callable[..., None]:
    """`figures.draw_overlap`; RunError where it cannot be imported."""
    try:
        from ..runs.pages.figures import draw_overlap
    except ImportError as error:
        raise RunError(f"--overlap-picture needs matplotlib ({error}): pip install matplotlib") from error
    return draw_overlap


def draw_heatmap(layers: list[int], matrix: list[list[float]]) -> Text:
    """The heatmap in the terminal: two digits a cell, in percent."""
    text = Text("\n|A ∩ B| / k of the layers' selections, in percent\n\n", style="bold")
    text.append("     " + "".join(f"{layer:>4}" for layer in layers) + "\n", style="dim")
    for layer, row in zip(layers, matrix):
        text.append(f"{layer:>4} ", style="dim")
        for value in row:
            shade = _SHADES[min(len(_SHADES) - 1, int(value * len(_SHADES)))]
            ink = "white" if value < 0.55 else "black"
            text.append(f"{round(100 * value):>4}", style=f"{ink} on {shade}")
        text.append("\n")
    return text
