"""Windows of tokens from text, JSONL, tensors or a dataset: what evaluation, search and training read.

Data are named by one string: what `text_sources.documents_of` reads, or a `.safetensors` file with `NAME_ids` (and
`NAME_recall`) tensors (`FILE:NAME` chooses).

Of text as much is tokenised as there are windows to choose from, `CANDIDATES` times as many as are wanted. Documents
are taken in order. A document longer than a part (`part_size`) is read part by part, in an order that the seed
chooses, and no window reaches over the end of a part.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import RunError
from .text_sources import DEFAULT_FIELD, Document, documents_of
from .tokenizer import Tokenizer
from .windows import INTEGERS, Windows

# By default: so many times top-k tokens per window, and so many windows.
DEFAULT_WINDOW = 32
DEFAULT_SAMPLES = 16
# Windows to choose one from, unless there is less text.
CANDIDATES = 4
# Characters (of files: bytes) that are tokenised at once, at least, and so many per token of a window.
PART_SIZE, PART_PER_TOKEN = 2**20, 32


@dataclass(frozen=True)
class Sampling:
    """How windows are taken from data.

    Attributes:
        seqlen: tokens per window; None for `DEFAULT_WINDOW` times top-k, at most the model's longest context, or for
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
    text_field: str = DEFAULT_FIELD

    def __post_init__(self) -> None:
        for name, value in (("seqlen", self.seqlen), ("nsamples", self.nsamples)):
            if value is not None and value < 1:
                raise RunError(f"--{name} must be at least 1 (got {value})")


def default_seqlen(max_position_embeddings: int, topk: int | None) -> int:
    """Tokens per window by default: `DEFAULT_WINDOW` times top-k, at most the model's longest context."""
    return min(max_position_embeddings, DEFAULT_WINDOW * (topk or 64))


def read_windows(data: str, tokenizer: Tokenizer | None, sampling: Sampling, seqlen: int, count: int) -> Windows:
    """`count` windows of one source of data, chosen at random; all windows of a file unless `nsamples` is given.

    Raises:
        RunError: unreadable or empty data, or data shorter than one window.
    """
    if named := windows_named(data):
        return windows_of_file(*named, sampling, count if sampling.nsamples else None)
    documents = documents_of(data, tokenizer, split=sampling.split, field=sampling.text_field)
    assert tokenizer is not None
    return _windows_of(documents, data, tokenizer, sampling, seqlen, count)


def windows_named(data: str) -> tuple[Path, str] | None:
    """The file of windows that `FILE.safetensors` or `FILE.safetensors:NAME` names, and the name; None for others."""
    path, _, name = data.rpartition(":")
    if path.endswith(".safetensors") and not Path(data).exists():
        return Path(path), name
    return (Path(data), "") if data.endswith(".safetensors") else None


def part_size(seqlen: int) -> int:
    """Characters of a text (of a file: bytes) that are tokenised at once."""
    return max(PART_SIZE, PART_PER_TOKEN * seqlen)


def windows_of_file(path: Path, name: str, sampling: Sampling, count: int | None) -> Windows:
    """The windows `NAME_ids` (or plain `ids`) of a safetensors file, all or `count` of them chosen at random."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise RunError(f"{path} does not exist, or is no file: check the path")
    try:
        with safe_open(path, "pt") as tensors:
            key, name = _chosen_key(path, name, list(tensors.keys()))
            recall_key = key.removesuffix("ids") + "recall"
            ids = tensors.get_tensor(key)
            recall = tensors.get_tensor(recall_key) if recall_key in tensors.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is no readable safetensors file: {error}") from error
    if recall is not None and (recall.is_floating_point() or recall.is_complex()):
        raise RunError(f"{path}: {recall_key} must be booleans or integers (got {recall.dtype})")
    ids = ids.long() if ids.dtype in INTEGERS else ids
    windows = Windows(ids, None if recall is None else recall.bool(), f"{path.name}:{name}" if name else path.name)
    if sampling.seqlen is not None and sampling.seqlen > windows.seqlen:
        raise RunError(
            f"{path}:{name} holds windows of {windows.seqlen:,} tokens, shorter than --seqlen {sampling.seqlen:,}"
        )
    if sampling.seqlen is not None:
        windows = windows.select((slice(None), slice(sampling.seqlen + 1)))
    if count is not None and count < len(windows):
        windows = windows.select(torch.tensor(random.Random(sampling.seed).sample(range(len(windows)), count)))
    return windows


def _chosen_key(path: Path, name: str, keys: list[str]) -> tuple[str, str]:
    """The tensor of token ids that `name` chooses among a file's, and its name."""
    named = {key.removesuffix("ids").removesuffix("_"): key for key in keys if key == "ids" or key.endswith("_ids")}
    if not named:
        raise RunError(f"{path} holds no NAME_ids tensor (it has {', '.join(keys) or 'none'})")
    if not name and name not in named:
        name = next(iter(named)) if len(named) == 1 else "calibration"
    if name not in named:
        raise RunError(f"{path} holds no {name}_ids (it has {', '.join(named.values())}): choose with {path}:NAME")
    return named[name], name


def _windows_of(
    documents: Iterable[Document], data: str, tokenizer: Tokenizer, sampling: Sampling, seqlen: int, count: int
) -> Windows:
    """`count` windows, or as many as there are: from single long documents while they last, else from packed ones."""
    size = seqlen + 1
    long: list[array[int]] = []
    packed = array("i")
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    total = 0
    order = random.Random(sampling.seed)
    for part in (part for document in documents for part in document.parts(part_size(size), order)):
        tokens = array("i", tokenizer.encode(part, add_special_tokens=False, verbose=False))
        total += len(tokens)
        long += [tokens[first : first + size] for first in range(0, len(tokens) - size + 1, size)]
        if len(tokens) < size and len(packed) < CANDIDATES * count * size:
            packed.extend(tokens)
            packed.extend(separator)
        # Enough to choose from, however large the data.
        if len(long) >= CANDIDATES * count:
            break
    random_ = random.Random(sampling.seed)
    chosen = random_.sample(long, min(count, len(long)))
    if len(chosen) < count:
        rest = [packed[first : first + size] for first in range(0, len(packed) - size + 1, size)]
        chosen += random_.sample(rest, min(count - len(chosen), len(rest)))
    if not chosen:
        raise RunError(
            f"{data} gives {total:,} tokens, less than one window of {size:,} (--seqlen {seqlen:,} and the token "
            "after it): give more text or a shorter --seqlen"
        )
    return Windows(torch.from_numpy(np.array(chosen, dtype=np.int64)), None, data)
