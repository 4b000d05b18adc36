"""Read JSON of unknown origin.

What a lenient reader accepts, and a writer, a printer or another loader then trips over, is refused with its reason.
"""

from __future__ import annotations

import json
from typing import Any

# Deeper than any config, and far from where recursive code (copying, writing with an indent) gives up.
MAX_DEPTH = 64


def parse_json(raw: bytes, *, allow_nan: bool = False) -> Any:
    """The value that JSON text in UTF-8 stands for.

    Args:
        raw: the file's bytes.
        allow_nan: take `NaN` and `Infinity`, which are no JSON, as Python writes them: for scores.

    Raises:
        ValueError: no JSON, another encoding, a byte-order mark, half a surrogate pair, a key that is there twice,
            `NaN` or `Infinity`, or more than `MAX_DEPTH` levels of nesting.
    """
    text = raw.decode("utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte-order mark")
    try:
        constant = None if allow_nan else _refuse_constant
        value = json.loads(text, object_pairs_hook=_without_repeated_keys, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_depth(value)
    # Only an escape can bring half a pair into text that was UTF-8.
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} is there twice")
            seen.add(name)
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half a surrogate pair ({error.object[error.start]!r})") from error
