"""Calibration data: fixed windows of tokens, some of them held out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import RunError
from .tokenizer import Tokenizer
from .window_sources import DEFAULT_SAMPLES, Sampling, default_seqlen, read_windows
from .windows import Windows, refuse_foreign_tokens

# Below so many times top-k tokens per window, selection is nearly everything and patterns score alike.
SHORT_WINDOW = 4
# Share of the samples that is held out for checks, unless held-out data are given.
HELD_OUT_SHARE = 4


def load_windows(
    data: str, config: Any, tokenizer: Tokenizer | None, sampling: Sampling, held_out: str | None = None
) -> tuple[Windows, Windows]:
    """Calibration windows and held-out windows.

    Args:
        data: see `runs/windows/window_sources.py`.
        config: of the model: `index_topk`, `max_position_embeddings`, `vocab_size`.
        tokenizer: for text; None will do for windows.
        sampling: how windows are taken.
        held_out: data for the held-out windows; by default a fourth as many as for calibration are split off.

    Raises:
        RunError: unreadable or empty data, data shorter than two windows, tokens outside the vocabulary.
    """
    seqlen = sampling.seqlen or default_seqlen(config.max_position_embeddings, config.index_topk)
    samples = sampling.nsamples or DEFAULT_SAMPLES
    spare = 0 if held_out else max(2, samples // HELD_OUT_SHARE)
    kept = read_windows(data, tokenizer, sampling, seqlen, samples + spare)
    if held_out:
        checks = read_windows(held_out, tokenizer, replace(sampling, nsamples=None), kept.seqlen, 4 * samples)
    else:
        if len(kept) < 2:
            raise RunError(
                f"{data} gives one window of {kept.seqlen + 1:,} tokens, and a second is needed for held-out "
                "checks: give more data, --held-out, or a shorter --seqlen"
            )
        if sampling.nsamples is None or len(kept) < samples + spare:
            spare = min(spare, max(1, len(kept) // (HELD_OUT_SHARE + 1)))
        kept, checks = kept.select(slice(0, len(kept) - spare)), kept.select(slice(len(kept) - spare, len(kept)))
    both = {row.numpy().tobytes() for row in kept.ids} & {row.numpy().tobytes() for row in checks.ids}
    if both:
        raise RunError(
            f"{len(both)} held-out windows are calibration windows too: give --held-out other data than {data}, or "
            "take fewer --nsamples"
        )
    for part in (kept, checks):
        refuse_foreign_tokens(part.ids, config.vocab_size, f"{part.origin} holds")
    return kept, checks


def short_window_warning(seqlen: int, topk: int | None) -> str | None:
    """What to say when windows are too short for patterns to differ, or None."""
    if topk is None or seqlen >= SHORT_WINDOW * topk:
        return None
    nothing = " Here selection is everything and EVERY PATTERN SCORES THE SAME." if seqlen <= topk else ""
    return (
        f"WINDOWS OF {seqlen:,} TOKENS ARE SHORT: the indexers select {topk:,} keys, so that most tokens of a window "
        f"see everything whatever the pattern.{nothing} Give --seqlen {SHORT_WINDOW * topk} or more (and documents as "
        "long), or the patterns found will fail at long context."
    )
