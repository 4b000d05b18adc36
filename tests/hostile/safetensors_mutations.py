"""Ways to spoil a safetensors file: its length, its header, its place in the index."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from json_mutations import VALUES, Spoilt

Header = dict[str, Any]
# What is done where the file stays valid and its numbers do not.
FLIPPED = "some bits are flipped"


def spoil_shard(data: bytes, chance: random.Random) -> Spoilt:
    """One mutation of a whole file."""
    ways: list[Callable[[bytes, random.Random], Spoilt]] = [_spoil_length, _spoil_header, _spoil_entry, _spoil_data]
    return chance.choices(ways, (3, 3, 6, 1))[0](data, chance)


def read(data: bytes) -> tuple[Header, bytes]:
    """The header and what follows it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(header: Header | str | bytes, body: bytes) -> bytes:
    """A file of a header, as JSON or as it is."""
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode("utf-8", errors="surrogatepass") if isinstance(header, str) else header
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _spoil_length(data: bytes, chance: random.Random) -> Spoilt:
    length = int.from_bytes(data[:8], "little")
    way = chance.choice(
        ["cut", "cut in the header", "cut at 8", "empty", "longer", "zero", "one more", "2^40", "2^64-1"]
    )
    if way.startswith("cut"):
        end = {"cut": chance.randrange(8 + length, len(data)), "cut at 8": chance.randrange(1, 9)}.get(
            way, chance.randrange(9, 8 + length)
        )
        return Spoilt(data[:end], f"cut to {end} of {len(data)} bytes", (), True)
    if way == "empty":
        return Spoilt(b"", "empty", (), True)
    if way == "longer":
        return Spoilt(data + bytes(chance.randrange(1, 4096)), "longer than its header says", (), True)
    said = {"zero": 0, "one more": length + 1, "2^40": 2**40, "2^64-1": 2**64 - 1}[way]
    return Spoilt(said.to_bytes(8, "little") + data[8:], f"its header's length is {said} for {length}", (), True)


def _spoil_header(data: bytes, chance: random.Random) -> Spoilt:
    header, body = read(data)
    text = json.dumps(header)
    name = chance.choice([name for name in header if name != "__metadata__"])
    twin = f"{json.dumps(name)}: {json.dumps(header[name])}"
    ways: dict[str, tuple[Any, bool | None]] = {
        "a byte-order mark": (b"\xef\xbb\xbf" + text.encode(), True),
        "a list as metadata": ({**header, "__metadata__": ["pt"]}, True),
        "a number in its metadata": ({**header, "__metadata__": {"format": 1}}, True),
        "null as metadata": ({**header, "__metadata__": None}, None),
        "metadata of another format": ({**header, "__metadata__": {"format": "nonsense"}}, None),
        "a lone surrogate in its metadata": ({**header, "__metadata__": {"format": "\ud800"}}, None),
        "no JSON": (text[:-1], True),
        "a list": (f"[{text}]", True),
        "NaN": (text[:-1] + ', "x": NaN}', True),
        "a tensor twice": (text[:-1] + f", {twin}}}", True),
        "white space before it": ("    " + text, None),
        "NULs after it": (text.encode() + bytes(16), None),
        "an empty object": ({}, True),
        "deep nesting": ('{"a":' * 50_000 + "1" + "}" * 50_000, True),
        "not UTF-8": (text.encode().replace(b'"', b'"\xff', 1), True),
        "a tensor with a lone surrogate": (
            {**header, "\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
            True,
        ),
        "an empty tensor more": (
            {**header, "extra": {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2}},
            None,
        ),
        "many names": (
            {
                **header,
                **{f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2} for n in range(3000)},
            },
            None,
        ),
    }
    way = chance.choice(list(ways))
    changed, fatal = ways[way]
    return Spoilt(write(changed, body), f"its header has {way}", (name,), fatal)


def _spoil_entry(data: bytes, chance: random.Random) -> Spoilt:
    header, body = read(data)
    name = chance.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    begin, end = entry["data_offsets"]
    ways: dict[str, tuple[Any, bool | None]] = {
        "an unknown dtype": ({**entry, "dtype": "Q4"}, True),
        "a dtype in small letters": ({**entry, "dtype": entry["dtype"].lower()}, True),
        "another dtype of its size": (
            {**entry, "dtype": {"BF16": "F16", "F32": "I32"}.get(entry["dtype"], "U8")},
            None,
        ),
        "one row more": ({**entry, "shape": [entry["shape"][0] + 1, *entry["shape"][1:]]}, True),
        "a shape turned round": ({**entry, "shape": entry["shape"][::-1]}, None),
        "a flat shape": ({**entry, "shape": [(end - begin) // {"BF16": 2, "F32": 4}.get(entry["dtype"], 1)]}, None),
        "a negative side": ({**entry, "shape": [-1, *entry["shape"][1:]]}, True),
        "a huge side": ({**entry, "shape": [2**40, *entry["shape"][1:]]}, True),
        "sides whose product overflows": ({**entry, "shape": [2**32, 2**32]}, True),
        "half sides": ({**entry, "shape": [float(side) for side in entry["shape"]]}, True),
        "offsets beyond the end": ({**entry, "data_offsets": [begin + len(body), end + len(body)]}, True),
        "offsets that overlap": (
            {**entry, "data_offsets": [max(0, begin - 8), max(0, begin - 8) + end - begin]},
            begin > 0 or None,
        ),
        "offsets turned round": ({**entry, "data_offsets": [end, begin]}, True),
        "negative offsets": ({**entry, "data_offsets": [begin - end, 0]}, True),
        "three offsets": ({**entry, "data_offsets": [begin, end, end]}, True),
        "offsets as text": ({**entry, "data_offsets": [str(begin), str(end)]}, True),
        "no dtype": ({key: value for key, value in entry.items() if key != "dtype"}, True),
        "no offsets": ({key: value for key, value in entry.items() if key != "data_offsets"}, True),
        "one key more": ({**entry, "extra": 1}, None),
    }
    if chance.random() < 0.2:
        kind, field = chance.choice(list(VALUES)), chance.choice(["dtype", "shape", "data_offsets"])
        way, changed, fatal = f"{field} {kind}", {**entry, field: VALUES[kind]}, None
    elif chance.random() < 0.2:
        other = chance.choice([f"{name}x", name.replace("model", "mode"), "", f"{name}\0", "__metadata__x"])
        renamed = {other if key == name else key: value for key, value in header.items()}
        return Spoilt(write(renamed, body), f"{name} is called {other[:30]!r}", (name, other), True)
    elif chance.random() < 0.2:
        return Spoilt(_without(header, body, name), f"{name} is missing", (name,), True)
    else:
        way = chance.choice(list(ways))
        changed, fatal = ways[way]
    return Spoilt(write({**header, name: changed}, body), f"{name} has {way}", (name,), fatal)


def _spoil_data(data: bytes, chance: random.Random) -> Spoilt:
    """Other numbers: a right file, whose tensors must come out as they are."""
    length = int.from_bytes(data[:8], "little")
    changed = bytearray(data)
    for _ in range(64):
        changed[chance.randrange(8 + length, len(data))] ^= 1 << chance.randrange(8)
    return Spoilt(bytes(changed), FLIPPED, (), None)


def _without(header: Header, body: bytes, name: str) -> bytes:
    """The file saved without one tensor."""
    kept, parts, at = {}, [], 0
    for key, entry in header.items():
        if key == name:
            continue
        if key == "__metadata__":
            kept[key] = entry
            continue
        begin, end = entry["data_offsets"]
        kept[key] = {**entry, "data_offsets": [at, at + end - begin]}
        parts.append(body[begin:end])
        at += end - begin
    return write(kept, b"".join(parts))
