"""Windows of tokens from text, JSONL, tensors or a dataset: what evaluation, search and training read.

Data are named by one string: a text file, `.jsonl`, `.safetensors` with `NAME_ids` (and `NAME_recall`) tensors
(`FILE:NAME` chooses), or a dataset's name (`org/name` or `org/name:config`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from .errors import EvaluationError
from .windows import Windows

# Unless told: so many times top-k tokens a window, and so many windows.
DEFAULT_WINDOW = 32
DEFAULT_SAMPLES = 16


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
                raise EvaluationError(f"--{name} must be at least 1 (got {value})")


def load_tokenizer(source: str, *, revision: str | None = None, token: str | None = None) -> Tokenizer | None:
    """A checkpoint's tokenizer, or None when it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, token=token)
    except (OSError, ValueError, KeyError):
        return None
    return tokenizer


def default_seqlen(max_position_embeddings: int, topk: int | None) -> int:
    """Tokens a window unless told: `DEFAULT_WINDOW` times top-k, at most the model's longest context."""
    return min(max_position_embeddings, DEFAULT_WINDOW * (topk or 64))


def read_windows(data: str, tokenizer: Tokenizer | None, sampling: Sampling, seqlen: int, count: int) -> Windows:
    """`count` windows of one source of data, chosen at random; all windows of a file unless `nsamples` is given.

    Raises:
        EvaluationError: unreadable or empty data, or data shorter than one window.
    """
    path, _, name = data.partition(":")
    if path.endswith(".safetensors"):
        return windows_of_file(Path(path), name, sampling, count if sampling.nsamples else None)
    documents = documents_of(data, tokenizer, sampling)
    assert tokenizer is not None
    return _windows_of(documents, data, tokenizer, sampling, seqlen, count)


def documents_of(data: str, tokenizer: Tokenizer | None, sampling: Sampling) -> Iterable[str]:
    """The texts of a file or dataset, in order, read as they are asked for.

    Raises:
        EvaluationError: at once for what is no text, or when no tokenizer can read it; later for what is damaged.
    """
    path, _, name = data.partition(":")
    if Path(data).is_dir():
        raise EvaluationError(f"{data} is a folder: give a text, .jsonl or .safetensors file, or a dataset's name")
    if tokenizer is None:
        raise EvaluationError(f"{data} is text, and the source has no tokenizer: give windows in .safetensors")
    if Path(data).is_file():
        return _from_file(Path(data), sampling)
    if data.count("/") <= 1 and not Path(data).suffix:
        return _from_dataset(path, name or None, sampling)
    raise EvaluationError(f"{data} is no file here and no dataset's name: check the path")


def windows_of_file(path: Path, name: str, sampling: Sampling, count: int | None) -> Windows:
    """The windows `NAME_ids` (or plain `ids`) of a safetensors file, all or `count` of them chosen at random."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise EvaluationError(f"{path} does not exist: check the path")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise EvaluationError(f"{path} is no readable safetensors file: {error}") from error
    keys = {key.removesuffix("ids").removesuffix("_"): key for key in tensors if key == "ids" or key.endswith("_ids")}
    names = list(keys)
    if not names:
        raise EvaluationError(f"{path} holds no NAME_ids tensor (it has {', '.join(tensors) or 'none'})")
    if not name and name not in keys:
        name = names[0] if len(names) == 1 else "calibration"
    if name not in names:
        raise EvaluationError(
            f"{path} holds no {name}_ids (it has {', '.join(keys.values())}): choose with {path}:NAME"
        )
    ids, recall = tensors[keys[name]], tensors.get(keys[name].removesuffix("ids") + "recall")
    windows = Windows(
        ids.long() if not ids.is_floating_point() else ids,
        None if recall is None else recall.bool(),
        f"{path.name}:{name}" if name else path.name,
    )
    if sampling.seqlen is not None and sampling.seqlen > windows.seqlen:
        raise EvaluationError(
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
        raise EvaluationError(f"{path} is no readable UTF-8 text: {error}") from error
    if not text.strip():
        raise EvaluationError(f"{path} is empty")
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
            raise EvaluationError(
                f"{path}, line {number}: no JSON record with a {sampling.text_field!r} field ({error}): "
                "choose the field with --text-field"
            ) from error
        yield str(value)


def _from_dataset(name: str, config: str | None, sampling: Sampling) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise EvaluationError(
            f"{name} is no file here; to take it as a dataset's name, pip install datasets"
        ) from error
    try:
        records = load_dataset(name, config, split=sampling.split, streaming=True)
        for record in records:
            if sampling.text_field not in record:
                raise EvaluationError(
                    f"dataset {name} has no field {sampling.text_field!r} (it has {', '.join(record)}): "
                    "choose with --text-field"
                )
            yield str(record[sampling.text_field])
    except EvaluationError:
        raise
    except Exception as error:  # what datasets raises depends on the dataset's format and the connection
        raise EvaluationError(f"{name} is no file here, and no dataset that can be read: {error}") from error


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
        raise EvaluationError(
            f"{data} gives {total:,} tokens, less than one window of {size:,} (--seqlen {seqlen:,} and the token "
            "after it): give more text or a shorter --seqlen"
        )
    return Windows(torch.tensor(chosen, dtype=torch.int64), None, data)
