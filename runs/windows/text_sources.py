"""Texts from files and datasets, document by document, each read in parts of a bounded size.

Read are text files, JSON lines, and with the `datasets` package whatever it reads: Parquet, CSV, JSON and Arrow
files, folders of such, folders that `save_to_disk` wrote, and datasets by name.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import RunError
from .tokenizer import Tokenizer

DEFAULT_FIELD, CHAT_FIELD = "text", "messages"
_JSONL = {".jsonl", ".ndjson"}
# Files that are no text, and the reader in `datasets` that takes them.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
}
_BOM = b"\xef\xbb\xbf"
# A part ends at the first line end behind its size that text follows, else at a line end, else before a space, if
# there is one so near: where tokenizers cut anyway.
_LOOK_AHEAD = 2**16
_CUTS = (rb"\n()(?=\S)", rb"\n()", rb"\S()(?=\s)", rb"()[^\x80-\xbf]")
_CUT_BYTES = [re.compile(cut) for cut in _CUTS]
_CUT_TEXT = [re.compile(cut.decode()) for cut in (*_CUTS[:3], rb"()")]
_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(Protocol):
    """A text that need not be in memory."""

    def parts(self, size: int, order: random.Random | None = None) -> Iterator[str]:
        """The text in parts of about `size` characters or bytes; in an order that `order` chooses, else in its own.

        A text that is no longer than `size` is one part.
        """
        ...


@dataclass(frozen=True)
class TextInMemory:
    """A document that has been read."""

    text: str

    def parts(self, size: int, order: random.Random | None = None) -> Iterator[str]:
        """See `Document`."""
        look = lambda at: _cut(self.text[at : at + _LOOK_AHEAD], _CUT_TEXT)
        for first, last in _spans(len(self.text), size, look, order):
            yield self.text[first:last]


@dataclass(frozen=True)
class TextFile:
    """A file of UTF-8 text as one document; a byte-order mark is left off, and line ends are made newlines."""

    path: Path

    def parts(self, size: int, order: random.Random | None = None) -> Iterator[str]:
        """See `Document`.

        Raises:
            RunError: the file cannot be read, is empty, or is no UTF-8 text.
        """
        try:
            with self.path.open("rb") as file:
                length = self.path.stat().st_size

                def read(first: int, nbytes: int) -> bytes:
                    file.seek(first)
                    return file.read(nbytes)

                look = lambda at: _cut(read(at, _LOOK_AHEAD), _CUT_BYTES)
                found = False
                for first, last in _spans(length, size, look, order):
                    raw = read(first, last - first)
                    text = (raw.removeprefix(_BOM) if first == 0 else raw).decode("utf-8")
                    found = found or bool(text.strip())
                    yield text.replace("\r\n", "\n").replace("\r", "\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{self.path} is no readable UTF-8 text: {error}") from error
        if not found:
            raise RunError(f"{self.path} is empty")


def documents_of(
    data: str, tokenizer: Tokenizer | None, *, split: str = "train", field: str = DEFAULT_FIELD
) -> Iterable[Document]:
    """The texts of a file, folder or dataset, in order, read as they are asked for.

    Args:
        data: a path, or a dataset's name (`org/name` or `org/name:config`).
        tokenizer: that will read them; its chat template makes text of records of chat messages.
        split: of a dataset.
        field: of records. The default `text` holds a text, and records without it may have chat messages in
            `messages`; any other field holds either. A null is no text and is left out.

    Raises:
        RunError: at once for what is no text, or when no tokenizer can read it; later for what is damaged.
    """
    path = Path(data)
    if not data.strip():
        raise RunError(f"{data!r} names no data: give a text file, .jsonl, .safetensors or a dataset's name")
    if tokenizer is None:
        raise RunError(f"{data} is text, and the source has no tokenizer: give windows in .safetensors")
    if path.is_dir():
        return _texts(_folder(path, split), field, tokenizer)
    if path.is_file() and path.suffix in _JSONL:
        return _texts(_json_lines(path), field, tokenizer)
    if path.is_file() and path.suffix in _READERS:
        reader, options = _READERS[path.suffix]
        return _texts(_dataset(data, reader, "train", data_files=data, **options), field, tokenizer)
    if path.is_file():
        return [TextFile(path)]
    name, _, config = data.partition(":")
    if data.count("/") <= 1 and not path.suffix:
        return _texts(_dataset(name, name, split, name=config or None), field, tokenizer)
    raise RunError(f"{data} is no file here and no dataset's name: check the path")


# ---- parts --------------------------------------------------------------------------------------------------------


def _spans(
    length: int, size: int, look: Callable[[int], int], order: random.Random | None
) -> Iterator[tuple[int, int]]:
    """Begin and end of each part; `look` gives how far behind a position the text may be cut."""
    size = max(size, 2 * _LOOK_AHEAD)
    numbers = list(range(max(1, length // size)))
    last = len(numbers) - 1
    if order is not None:
        order.shuffle(numbers)

    def begin(number: int) -> int:
        return number * size + look(number * size) if number else 0

    for number in numbers:
        yield begin(number), length if number == last else begin(number + 1)


def _cut(behind: Any, cuts: list[re.Pattern[Any]]) -> int:
    """How far into what follows a position the text is cut."""
    found = next(filter(None, (cut.search(behind) for cut in cuts)), None)
    return found.start(1) if found else 0


# ---- records ------------------------------------------------------------------------------------------------------


def _texts(records: Iterator[tuple[str, Any]], field: str, tokenizer: Tokenizer) -> Iterator[Document]:
    """The texts of records, each given with where it stands."""
    for where, record in records:
        text = _text_of(record, field, tokenizer, where)
        # Not held here, too, while it is read.
        del record
        if text is not None:
            yield TextInMemory(text)


def _text_of(record: Any, field: str, tokenizer: Tokenizer, where: str) -> str | None:
    if not isinstance(record, dict):
        raise RunError(f"{where}: a JSON object belongs there, with a field {field!r} (got {_kind(record)})")
    if field not in record and field == DEFAULT_FIELD and CHAT_FIELD in record:
        field = CHAT_FIELD
    if field not in record:
        raise RunError(
            f"{where}: the record has no field {field!r} (it has {', '.join(map(str, record)) or 'none'}): choose "
            "with --text-field"
        )
    value = record[field]
    if value is None:
        return None
    if isinstance(value, list) and value and all(isinstance(part, dict) and "role" in part for part in value):
        if field == DEFAULT_FIELD:
            raise RunError(
                f"{where}: field {field!r} holds chat messages where a text belongs: call it {CHAT_FIELD!r}, or give "
                "it another name and that to --text-field"
            )
        value = _chat_text(value, tokenizer, where)
    if not isinstance(value, str):
        raise RunError(
            f"{where}: field {field!r} holds {_kind(value)} where a text"
            f"{'' if field == DEFAULT_FIELD else ' or a list of chat messages (role, content)'} belongs: choose with "
            "--text-field"
        )
    if lone := _SURROGATE.search(value):
        raise RunError(
            f"{where}: the text holds {lone[0]!r} at character {lone.start()}, half of a surrogate pair, which is no "
            "character: fix what wrote it"
        )
    return value


def _chat_text(messages: list[Any], tokenizer: Any, where: str) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise RunError(
            f"{where} holds chat messages, and the source's tokenizer has no chat template: give records with a text "
            "(--text-field)"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise RunError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from error


def _kind(value: Any) -> str:
    shown = json.dumps(value, default=str)
    return f"a {type(value).__name__}, {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a JSONL file: a newline ends a line and nothing else does; one line at a time is in memory."""
    number = records = 0
    try:
        with path.open("rb") as file:
            for line in file:
                number += 1
                where, line = f"{path}, line {number}", line.removeprefix(_BOM) if number == 1 else line
                if line.isspace():
                    continue
                records += 1
                try:
                    record = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise RunError(f"{where}: no JSON ({error}): fix the line") from error
                # A line of gigabytes is held once, as the record.
                line = b""
                yield where, record
                record = None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not records:
        raise RunError(f"{path} is empty")


def _folder(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """The records of a folder of data files, or of a dataset that was saved to disk."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _dataset(str(path), str(path), split)
    datasets = _datasets(str(path))

    def records() -> Iterator[Any]:
        found = datasets.load_from_disk(str(path))
        if isinstance(found, dict):
            if split not in found:
                raise RunError(f"{path} has no split {split!r} (it has {', '.join(found)}): --data-split")
            found = found[split]
        yield from found

    return _guarded(str(path), records)


def _dataset(what: str, reader: str, split: str, **options: Any) -> Iterator[tuple[str, Any]]:
    """The records that `datasets` streams."""
    datasets = _datasets(what)
    return _guarded(what, lambda: datasets.load_dataset(reader, split=split, streaming=True, **options))


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        is_here = Path(what).exists()
        needed = f"reading {what}" if is_here else f"{what} is no file here; taking it as a dataset's name"
        raise RunError(f"{needed} needs datasets ({error}): pip install datasets") from error
    return datasets


def _guarded(what: str, load: Callable[[], Iterable[Any]]) -> Iterator[tuple[str, Any]]:
    try:
        for number, record in enumerate(load(), start=1):
            yield f"{what}, record {number}", record
    except RunError:
        raise
    except Exception as error:  # what datasets raises depends on the format and the connection
        known = "cannot be read" if Path(what).exists() else "is no file here, and no dataset that can be read"
        raise RunError(f"{what} {known}: {error}") from error
