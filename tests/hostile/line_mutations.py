"""Ways to spoil a journal of JSON lines: what was written down is not what is read."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from json_mutations import Spoilt, spoil


def spoil_lines(data: bytes, chance: random.Random) -> Spoilt:
    """One mutation of a file of lines."""
    lines = data.splitlines(keepends=True)
    way = chance.choices(list(_WAYS), [weight for weight, _ in _WAYS.values()])[0]
    at = chance.randrange(len(lines))
    _WAYS[way][1](lines, at, chance)
    return Spoilt(
        b"".join(lines), f"line {at + 1} of {len(data.splitlines())}: {way}", (f"line {at + 1}", str(at + 1))
    )


def _flip_digit(lines: list[bytes], at: int, chance: random.Random) -> None:
    places = [match.start() for match in re.finditer(rb"\d", lines[at])]
    if places:
        place = chance.choice(places)
        digit = b"%d" % ((int(lines[at][place : place + 1]) + chance.randrange(1, 9)) % 10)
        lines[at] = lines[at][:place] + digit + lines[at][place + 1 :]


def _flip_bit(lines: list[bytes], at: int, chance: random.Random) -> None:
    line = bytearray(lines[at])
    line[chance.randrange(len(line))] ^= 1 << chance.randrange(8)
    lines[at] = bytes(line)


def _drop(lines: list[bytes], at: int, chance: random.Random) -> None:
    del lines[at]


def _drop_all_after(lines: list[bytes], at: int, chance: random.Random) -> None:
    del lines[at:]


def _twice(lines: list[bytes], at: int, chance: random.Random) -> None:
    lines.insert(chance.randrange(at, len(lines)) + 1, lines[at])


def _swap(lines: list[bytes], at: int, chance: random.Random) -> None:
    other = chance.randrange(len(lines))
    lines[at], lines[other] = lines[other], lines[at]


def _cut(lines: list[bytes], at: int, chance: random.Random) -> None:
    lines[at] = lines[at][: chance.randrange(len(lines[at]))]


def _cut_end(lines: list[bytes], at: int, chance: random.Random) -> None:
    lines[-1] = lines[-1][: chance.randrange(len(lines[-1]))]


def _add(lines: list[bytes], at: int, chance: random.Random) -> None:
    lines.insert(
        at, chance.choice([b"\n", b"{}\n", b"[]\n", b"null\n", b"no JSON\n", b"\xff\xfe\n", b"[" * 99_999 + b"\n"])
    )


def _spoil(lines: list[bytes], at: int, chance: random.Random) -> None:
    body = lines[at].rstrip(b"\n")
    try:
        lines[at] = spoil(body, chance).data.replace(b"\n", b" ") + b"\n"
    except ValueError:  # a line that is no plain JSON
        _flip_bit(lines, at, chance)


def _empty(lines: list[bytes], at: int, chance: random.Random) -> None:
    lines.clear()


_WAYS: dict[str, tuple[int, Callable[[list[bytes], int, random.Random], None]]] = {
    "a digit is another": (4, _flip_digit),
    "a bit is flipped": (3, _flip_bit),
    "dropped": (3, _drop),
    "dropped, and all after it": (1, _drop_all_after),
    "there twice": (2, _twice),
    "swapped with another": (2, _swap),
    "cut": (1, _cut),
    "the last line is cut": (1, _cut_end),
    "a strange line before it": (2, _add),
    "spoilt": (6, _spoil),
    "the file is empty": (1, _empty),
}
