"""Compare JSON values with the shape that their readers rely on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def misfit(value: Any, shape: Any, where: str = "") -> str | None:
    """What in `value` has another type than `shape` asks for, or is missing; None where all is there.

    Args:
        value: of a JSON file.
        shape: a type; a list of one shape, that of every entry; or a dict of shapes by key, where `str` means
            every key and `key?` for one that may be missing.
        where: how the sentence names the value.
    """
    kind: type = shape if isinstance(shape, type) else type(shape)
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    is_accepted = isinstance(value, accepted)
    if not is_accepted or (isinstance(value, bool) and kind is not bool):
        return f"{where or 'the document'} must be a {kind.__name__} (got {json.dumps(value)[:60]})"
    if isinstance(shape, list):
        return _first(misfit(item, shape[0], f"{where}[{number}]") for number, item in enumerate(value))
    if isinstance(shape, dict) and str in shape:
        return _first(misfit(item, shape[str], _below(where, key)) for key, item in value.items())
    if isinstance(shape, dict):
        return _first(_of_key(value, key, inner, where) for key, inner in shape.items())
    return None


def _of_key(value: dict[str, Any], key: str, shape: Any, where: str) -> str | None:
    name = key.removesuffix("?")
    if name in value:
        return misfit(value[name], shape, _below(where, name))
    return None if key.endswith("?") else f"{_below(where, name)} is missing"


def _below(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _first(problems: Iterable[str | None]) -> str | None:
    return next(filter(None, problems), None)
