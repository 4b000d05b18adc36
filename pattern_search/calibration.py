"""Calibration data: fixed windows of tokens from text, JSONL, tensors or a dataset, some of them held out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import PatternSearchError
from .windows import Windows

# Below so many times top-k tokens a window, selection is nearly everything and patterns score alike.
SHORT_WINDOW = 4
# Unless told: so many times top-k tokens a window.
DEFAULT_WINDOW = 32
DEFAULT_SAMPLES = 16
# Share of the samples that is held out for checks, unless held-out data are given.
HELD_OUT_SHARE = 4


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """Token ids of `text`."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How windows are taken from data.

    Attributes:
        seqlen: tokens a window; None for `DEFAULT_WINDOW` times top-k, at most the model's longest context, or for
            what a file of windows holds.
        nsamples: calibration windows; None for `DEFAULT_SAMPLES`, or for all windows of a file.
        seed: of the choice of windows.
        split: of a dataset.
        text_field: of JSONL records and datasets.
    """

    seqlen: int | None = None
    nsamples: int | None = None
    seed: int = 0
    split: str = "train"
    text_field: str = "text"

    def __post_init__(self) -> None:
        for name, value in (("seqlen", self.seqlen), ("nsamples", self.nsamples)):
            if value is not None and value < 1:
                raise PatternSearchError(f"--{name} must be at least 1 (got {value})")


def load_tokenizer(source: str, *, revision: str | None = None, token: str | None = None) -> Tokenizer | None:
    """A checkpoint's tokenizer, or None when it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, token=token)
    except (OSError, ValueError, KeyError):
        return None
    return tokenizer


def load_windows(
    data: str, config: Any, tokenizer: Tokenizer | None, sampling: Sampling, held_out: str | None = None
) -> tuple[Windows, Windows]:
    """Calibration windows and held-out windows.

    Args:
        data: a text file, `.jsonl`, `.safetensors` with `NAME_ids` (and `NAME_recall`) tensors, or a dataset's name
            (`org/name` or `org/name:config`). `FILE:NAME` chooses among a file's tensors; `calibration` where
            nothing is chosen and there are several.
        config: of the model: `index_topk`, `max_position_embeddings`, `vocab_size`.
        tokenizer: for text; None will do for windows.
        sampling: how windows are taken.
        held_out: data for the held-out windows; by default a fourth as many as for calibration are split off.

    Raises:
        PatternSearchError: unreadable or empty data, data shorter than two windows, tokens outside the vocabulary.
    """
    seqlen = sampling.seqlen or min(config.max_position_embeddings, DEFAULT_WINDOW * (config.index_topk or 64))
    samples = sampling.nsamples or DEFAULT_SAMPLES
    spare = 0 if held_out else max(2, samples // HELD_OUT_SHARE)
    kept = read_windows(data, tokenizer, sampling, seqlen, samples + spare)
    if held_out:
        checks = read_windows(held_out, tokenizer, replace(sampling, nsamples=None), kept.seqlen, 4 * samples)
    else:
        if len(kept) < 2:
            raise PatternSearchError(
                f"{data} gives one window of {kept.seqlen + 1:,} tokens, and a second is needed for held-out "
                "checks: give more data, --held-out, or a shorter --seqlen"
            )
        if sampling.nsamples is None or len(kept) < samples + spare:
            spare = min(spare, max(1, len(kept) // (HELD_OUT_SHARE + 1)))
        kept, checks = kept.select(slice(0, len(kept) - spare)), kept.select(slice(len(kept) - spare, len(kept)))
    both = {row.numpy().tobytes() for row in kept.ids} & {row.numpy().tobytes() for row in checks.ids}
    if both:
        raise PatternSearchError(
            f"{len(both)} held-out windows are calibration windows too: give --held-out other data than --data"
        )
    for part in (kept, checks):
        low, high = int(part.ids.min()), int(part.ids.max())
        if low < 0 or high >= config.vocab_size:
            raise PatternSearchError(
                f"{part.origin} holds tokens {low} .. {high}, the model knows 0 .. {config.vocab_size - 1}: the "
                "windows were made with another tokenizer"
            )
    return kept, checks


def short_window_warning(seqlen: int, topk: int | None) -> str | None:
    """What to say when windows are too short to tell patterns apart, or None."""
    if topk is None or seqlen >= SHORT_WINDOW * topk:
        return None
    nothing = " Here selection is everything and EVERY PATTERN SCORES THE SAME." if seqlen <= topk else ""
    return (
        f"WINDOWS OF {seqlen:,} TOKENS ARE SHORT: the indexers select {topk:,} keys, so that most tokens of a window "
        f"see everything whatever the pattern.{nothing} Give --seqlen {SHORT_WINDOW * topk} or more (and documents as "
        "long), or the patterns found will fail at long context."
    )


# ---- reading ------------------------------------------------------------------------------------------------------


def read_windows(data: str, tokenizer: Tokenizer | None, sampling: Sampling, seqlen: int, count: int) -> Windows:
    """`count` windows of one source of data, chosen at random; see `load_windows`."""
    path, _, name = data.partition(":")
    if path.endswith(".safetensors"):
        return windows_of_file(Path(path), name, sampling, count if sampling.nsamples else None)
    documents = documents_of(data, tokenizer, sampling)
    assert tokenizer is not None
    return _windows_of(documents, data, tokenizer, sampling, seqlen, count)


def documents_of(data: str, tokenizer: Tokenizer | None, sampling: Sampling) -> Iterable[str]:
    """The texts of a file or dataset, in order, read as they are asked for.

    Raises:
        PatternSearchError: at once for what is no text, or when no tokenizer can read it; later for what is damaged.
    """
    path, _, name = data.partition(":")
    if Path(data).is_dir():
        raise PatternSearchError(f"{data} is a folder: give a text, .jsonl or .safetensors file, or a dataset's name")
    if tokenizer is None:
        raise PatternSearchError(f"{data} is text, and the source has no tokenizer: give windows in .safetensors")
    if Path(data).is_file():
        return _from_file(Path(data), sampling)
    if data.count("/") <= 1 and not Path(data).suffix:
        return _from_dataset(path, name or None, sampling)
    raise PatternSearchError(f"{data} is no file here and no dataset's name: check the path")


def windows_of_file(path: Path, name: str, sampling: Sampling, count: int | None) -> Windows:
    """The windows `NAME_ids` of a safetensors file, all or `count` of them chosen at random."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise PatternSearchError(f"{path} does not exist: check the path")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PatternSearchError(f"{path} is no readable safetensors file: {error}") from error
    names = [key.removesuffix("_ids") for key in tensors if key.endswith("_ids")]
    if not names:
        raise PatternSearchError(f"{path} holds no NAME_ids tensor (it has {', '.join(tensors) or 'none'})")
    name = name or (names[0] if len(names) == 1 else "calibration")
    if name not in names:
        raise PatternSearchError(f"{path} holds no {name}_ids (it has {', '.join(names)}): choose with {path}:NAME")
    recall = tensors.get(f"{name}_recall")
    ids = tensors[f"{name}_ids"]
    windows = Windows(
        ids.long() if not ids.is_floating_point() else ids,
        None if recall is None else recall.bool(),
        f"{path.name}:{name}",
    )
    if sampling.seqlen is not None and sampling.seqlen > windows.seqlen:
        raise PatternSearchError(
            f"{path}:{name} holds windows of {windows.seqlen:,} tokens, shorter than --seqlen {sampling.seqlen:,}"
        )
    if sampling.seqlen is not None:
        stop = sampling.seqlen + 1
        recall = None if windows.recall is None else windows.recall[:, :stop]
        windows = Windows(windows.ids[:, :stop], recall, windows.origin)
    if count is not None and count < len(windows):
        chosen = torch.tensor(random.Random(sampling.seed).sample(range(len(windows)), count))
        windows = Windows(
            windows.ids[chosen], None if windows.recall is None else windows.recall[chosen], windows.origin
        )
    return windows


def _from_file(path: Path, sampling: Sampling) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatternSearchError(f"{path} is no readable UTF-8 text: {error}") from error
    if not text.strip():
        raise PatternSearchError(f"{path} is empty")
    if path.suffix not in {".jsonl", ".ndjson"}:
        yield text
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            value = record[sampling.text_field]
        except (ValueError, KeyError, TypeError) as error:
            raise PatternSearchError(
                f"{path}, line {number}: no JSON record with a {sampling.text_field!r} field ({error}): "
                "choose the field with --text-field"
            ) from error
        yield str(value)


def _from_dataset(name: str, config: str | None, sampling: Sampling) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise PatternSearchError(
            f"{name} is no file here; to take it as a dataset's name, pip install datasets"
        ) from error
    try:
        records = load_dataset(name, config, split=sampling.split, streaming=True)
        for record in records:
            if sampling.text_field not in record:
                raise PatternSearchError(
                    f"dataset {name} has no field {sampling.text_field!r} (it has {', '.join(record)}): "
                    "choose with --text-field"
                )
            yield str(record[sampling.text_field])
    except PatternSearchError:
        raise
    except Exception as error:  # what datasets raises depends on the dataset's format and the connection
        raise PatternSearchError(f"{name} is no file here, and no dataset that can be read: {error}") from error


def _windows_of(
    documents: Iterable[str], data: str, tokenizer: Tokenizer, sampling: Sampling, seqlen: int, count: int
) -> Windows:
    """`count` windows, or as many as there are: from single long documents while they last, else from packed ones."""
    size = seqlen + 1
    long: list[list[int]] = []
    packed: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    total = 0
    for text in documents:
        tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        total += len(tokens)
        long += [tokens[first : first + size] for first in range(0, len(tokens) - size + 1, size)]
        if len(tokens) < size and len(packed) < 4 * count * size:
            packed += tokens + separator
        # Enough to choose from, however large the dataset.
        if len(long) >= 4 * count:
            break
    random_ = random.Random(sampling.seed)
    chosen = random_.sample(long, min(count, len(long)))
    if len(chosen) < count:
        rest = [packed[first : first + size] for first in range(0, len(packed) - size + 1, size)]
        chosen += random_.sample(rest, min(count - len(chosen), len(rest)))
    if not chosen:
        raise PatternSearchError(
            f"{data} gives {total:,} tokens, less than one window of {size:,} (--seqlen {seqlen:,} and the token "
            "after it): give more text or a shorter --seqlen"
        )
    return Windows(torch.tensor(chosen, dtype=torch.int64), None, data)
