"""Ways to spoil a JSON document: its values, its keys, its bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Values by what they are; every one is of the wrong type, or the wrong size, for almost every field.
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "a word": "no",
    "an empty string": "",
    "zero": 0,
    "minus one": -1,
    "2^31": 2**31,
    "2^63": 2**63,
    "a half": 0.5,
    "1e308": 1e308,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "an empty list": [],
    "an empty object": {},
    "a list in a list": [[1]],
    "an object": {"a": {"b": None}},
    "a lone surrogate": "\ud800",
    "a NUL": "a\0b",
    "an escape sequence": "\x1b[2Jred",
    "markup": "[bold]x[/nonsense]",
    "a path outside": "../outside/secret.txt",
    "an absolute path": "/etc/hostname",
    "a long string": "x" * 100_000,
    "a long list": [0] * 20_000,
}
DEEP = 100_000
DIGITS = 6_000


@dataclass(frozen=True)
class Spoilt:
    """What a mutation made.

    Attributes:
        data: the bytes.
        what: what was done, in words.
        names: strings of which an error message may name one.
        fatal: whether nothing may take the file: True, False (harmless), or None where it depends.
        path: where in the document; empty for the bytes as a whole.
        value: what was put there, where a value was changed.
    """

    data: bytes
    what: str
    names: tuple[str, ...] = ()
    fatal: bool | None = None
    path: tuple[Any, ...] = ()
    value: Any = None


def spoil(data: bytes, chance: random.Random, under: tuple[Any, ...] = ()) -> Spoilt:
    """One mutation of a JSON document, below the place `under` where it is of its values."""
    if chance.random() < 0.3:
        return spoil_bytes(data, chance)
    document = json.loads(data)
    place = _somewhere(document, chance, under)
    if not place:
        return spoil_bytes(data, chance)
    named = tuple(str(part) for part in place if not isinstance(part, int))
    key = place[-1]
    parent = _at(document, place[:-1])
    way = chance.choices(("value", "missing", "twice", "renamed", "huge number", "deep"), (12, 3, 2, 1, 1, 1))[0]
    where = "/".join(map(str, place))
    if way == "missing":
        del parent[key]
        return Spoilt(_dump(document), f"{where} is missing", named, None, place)
    if way == "renamed" and isinstance(parent, dict):
        name = chance.choice(["\ud800", "", "x" * 5000, key.upper(), f"{key}\0", f" {key}", "[red]", "\x1b[2J"])
        parent[name] = parent.pop(key)
        return Spoilt(_dump(document), f"{where} is called {name[:40]!r}", (*named, *_shown(name)), None, place)
    mark = '"@@here@@"'
    old = parent[key]
    if way == "twice" and isinstance(parent, dict):
        parent[key] = "@@here@@"
        twin = json.dumps(key) + ": " + json.dumps(old)
        text = _dump(document).decode().replace(mark, f"{json.dumps(old)}, {twin}", 1)
        return Spoilt(text.encode(), f"{where} is there twice", named, True, place)
    if way in ("huge number", "deep"):
        parent[key] = "@@here@@"
        filling = "9" * DIGITS if way == "huge number" else "[" * DEEP + "]" * DEEP
        text = _dump(document).decode().replace(mark, filling, 1)
        return Spoilt(text.encode(), f"{where} is a {way} value", named, None, place)
    kind = chance.choice(list(VALUES))
    parent[key] = VALUES[kind]
    return Spoilt(_dump(document), f"{where} is {kind}", (*named, *_shown(VALUES[kind])), None, place, VALUES[kind])


def spoil_bytes(data: bytes, chance: random.Random) -> Spoilt:
    """One mutation of a file that should be a JSON object, whatever it says."""
    way = chance.choice(list(_BYTES))
    return Spoilt(_BYTES[way](data, chance), f"the file is {way}", (), None if way in _READABLE else True)


_BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, chance: b"",
    "truncated": lambda data, chance: data.rstrip()[: chance.randrange(1, max(2, len(data.rstrip()) - 1))],
    "a list": lambda data, chance: b"[" + data + b"]",
    "null": lambda data, chance: b"null",
    "a number": lambda data, chance: b"17",
    "a string": lambda data, chance: b'"config"',
    "behind a byte-order mark": lambda data, chance: b"\xef\xbb\xbf" + data,
    "in UTF-16": lambda data, chance: data.decode("utf-8", errors="replace").encode("utf-16"),
    "not UTF-8": lambda data, chance: data.replace(b'"', b'"\xff\xfe', 1),
    "followed by more": lambda data, chance: data + b"\n{}",
    "made of NULs": lambda data, chance: bytes(len(data)),
    "HTML": lambda data, chance: b"<!doctype html><html></html>",
    "nested deeply": lambda data, chance: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "half nested deeply": lambda data, chance: b"[" * DEEP,
    "a Git LFS pointer": lambda data, chance: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "padded": lambda data, chance: b" \n" * 1000 + data + b"\n" * 1000,
}

# JSON all the same, for those who look for it.
_READABLE = ("padded", "behind a byte-order mark", "in UTF-16")


def _somewhere(document: Any, chance: random.Random, under: tuple[Any, ...]) -> tuple[Any, ...]:
    """A random place, rather high up than deep down."""
    place = list(under)
    here = _at(document, under)
    while isinstance(here, dict | list) and here:
        key = chance.choice(list(here)) if isinstance(here, dict) else chance.randrange(len(here))
        place.append(key)
        here = here[key]
        if chance.random() < 0.4:
            break
    return tuple(place) if len(place) > len(under) else ()


def _at(document: Any, place: tuple[Any, ...]) -> Any:
    for part in place:
        document = document[part]
    return document


def _dump(document: Any) -> bytes:
    return json.dumps(document, indent=1).encode()


def _shown(value: Any) -> tuple[str, ...]:
    """How a message may show a value."""
    text = value if isinstance(value, str) else json.dumps(value)
    return tuple(part for part in {text[:30], repr(value)[:30], ascii(value)[:30]} if part)
