"""Tries whose checkpoint is right, and whose patterns, recipes, journals, outputs, data or options are not."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from json_mutations import VALUES, Spoilt, spoil
from line_mutations import spoil_lines
from tries import Check, Try, contents, same_result, words
from workshop import Run, Workshop

LAYERS = 4


def pattern_file(shop: Workshop, chance: random.Random) -> Try:
    """The file that a search writes and convert, export and inspect read."""
    box = shop.box("deepseek", "try")
    result = chance.random() < 0.5
    path = box / "work" / ("result.json" if result else chance.choice(["pattern.json", "patterns.json"]))
    if result:
        path.write_text(json.dumps(_search_result(shop, box)))
    spoilt = _spoilt_pattern(path.read_bytes(), chance)
    path.write_bytes(spoilt.data)
    file = f"work/{path.name}"
    argv = chance.choice(
        [
            ["convert", "source", "output", "--pattern-file", file],
            ["convert", "source", "output", "--pattern-file", file, "--keep", chance.choice(["2", "1/2", "1/4", "3"])],
            ["inspect", file],
            ["inspect", file, "--json"],
            [
                "export",
                file,
                "output.json",
                "--to",
                chance.choice(["vllm", "megatron", "transformers"]),
                "--keep",
                "2",
            ],
            ["export", file, "output.json", "--to", "vllm"],
        ]
    )
    must = True if spoilt.fatal and spoilt.what.startswith("the file") else None
    return Try(
        f"{file}: {spoilt.what}", box, argv, must, (*spoilt.names, path.name, "pattern"), ("output", "output.json")
    )


def _search_result(shop: Workshop, box: Path) -> dict:
    """patterns.json as a search writes it."""
    if "search result" not in shop.known:
        found = shop.run(box, words("search"))
        assert found.code == 0, found.err
        shop.known["search result"] = json.loads((box / "output" / "patterns.json").read_text())
        shutil.rmtree(box / "output")
    return shop.known["search result"]


def _spoilt_pattern(data: bytes, chance: random.Random) -> Spoilt:
    document = json.loads(data)
    patterns = document.get("patterns")
    if chance.random() < 0.4 and patterns:
        key = chance.choice(list(patterns))
        patterns[key] = chance.choice(
            ["FSF", "FSFSF", "SFFF", "XFFS", "fsfs", " FSFS", "FSFS\n", "", "F" * 10**6, "ＦＳＦＳ", *VALUES.values()]
        )
        return Spoilt(
            json.dumps(document).encode(), f"patterns/{key} is {str(patterns[key])[:40]!r}", (key, "pattern")
        )
    return spoil(data, chance, ("patterns",) if patterns and chance.random() < 0.3 else ())


def recipe(shop: Workshop, chance: random.Random) -> Try:
    """The recipe of a finished conversion, doctored; the next run in that folder must not be led astray."""
    box = shop.box("deepseek", "try")
    path = box / "converted" / "indexcache_recipe.json"
    strays = [
        "../outside/kept.json",
        "encoding/../../outside/kept.json",
        "link/kept.json",
        "/etc/hostname",
        ".",
        "..",
        "",
        "link",
        "\0",
        "\ud800",
        7,
        None,
        ["x"],
        "../source/config.json",
        "encoding",
    ]
    if chance.random() < 0.6:
        document = json.loads(path.read_bytes())
        stray = chance.sample(strays, 3)
        if chance.random() < 0.5:
            document["files"] += stray
        else:
            document["shards"] |= {str(name): {"sha256": "0", "size": 1} for name in stray}
        spoilt = Spoilt(json.dumps(document).encode(), f"names {stray}")
    else:
        spoilt = spoil(path.read_bytes(), chance)
    path.write_bytes(spoilt.data)
    os.symlink("../outside", box / "converted" / "link")
    if chance.random() < 0.3:
        shutil.rmtree(box / "converted" / "encoding")
        os.symlink("../outside", box / "converted" / "encoding")
    extra = chance.choice([["--overwrite"], ["--overwrite"], ["--resume"], ["--overwrite", "--resume"], []])
    argv = ["convert", "source", "converted", "--pattern", chance.choice(["FSFS", "FFSS"]), *extra]
    names = (*spoilt.names, "converted", "indexcache_recipe.json", "encoding")
    return Try(f"recipe: {spoilt.what}; {extra}", box, argv, None, names, ("converted",))


def journal(shop: Workshop, chance: random.Random) -> Try:
    """A journal that is not what was written; with --resume the result is the undisturbed one, or an error."""
    verb = chance.choice(["search", "eval", "search", "eval", "convert cast", "distill"])
    box = shop.box("deepseek", "try")
    argv = words(verb)
    key = f"undisturbed {verb}"
    check = same_result(shop, box, argv, key)
    name = "journal.jsonl"
    if verb in ("search", "eval"):
        found = shop.run(box, argv)
        assert found.code == 0, found.err
        _without_results(box / "output")
        spoilt = spoil_lines((box / "output" / name).read_bytes(), chance)
    else:
        name = ".indexcache_convert.json"
        for at in range(chance.randrange(8, 40), 0, -2):
            shop.discard(box / "output")
            shop.run(box, argv, {"kind": "kill", "at": at})
            if (box / "output" / name).exists():
                break
        else:
            raise RuntimeError(f"{verb} leaves no journal")
        spoilt = spoil((box / "output" / name).read_bytes(), chance)
    (box / "output" / name).write_bytes(spoilt.data)
    names = (*spoilt.names, name, "output", "--resume", "journal")
    return Try(f"{verb}'s {name}, {spoilt.what}", box, [*argv, "--resume"], None, names, check=check)


def _without_results(output: Path) -> None:
    for path in output.iterdir():
        if path.name != "journal.jsonl":
            path.unlink()


def damaged_output(shop: Workshop, chance: random.Random) -> Try:
    """A finished output that was damaged since: --resume mends it or says so, and never calls it done."""
    box = shop.box("deepseek", "try")
    verb = chance.choice(["convert", "convert cast", "convert copy"])
    argv = words(verb)
    check = same_result(shop, box, argv, f"undisturbed {verb}")
    found = shop.run(box, argv)
    assert found.code == 0, found.err
    path = chance.choice(sorted(path for path in (box / "output").rglob("*") if path.is_file()))
    name = path.relative_to(box / "output").as_posix()
    way = chance.choice(["gone", "empty", "an empty object", "cut", "a bit flipped", "a folder", "a link outside"])
    data = path.read_bytes()
    path.unlink()
    if way == "a folder":
        path.mkdir()
    elif way == "a link outside":
        path.symlink_to(os.path.relpath(box / "outside" / "kept.json", path.parent))
    elif way != "gone":
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 4
        changed = {
            "empty": b"",
            "an empty object": b"{}",
            "cut": data[: len(data) // 2],
            "a bit flipped": bytes(flipped),
        }
        path.write_bytes(changed[way])
    return Try(
        f"{verb} is finished, then {name} is {way}", box, [*argv, "--resume"], None, (name, "output"), check=check
    )


# ---- data ---------------------------------------------------------------------------------------------------------

_GOOD = [json.dumps({"text": " ".join(f"w{(3 * n + 5 * m) % 60}" for n in range(40))}) for m in range(6)]


def data(shop: Workshop, chance: random.Random) -> Try:
    """Text and JSON lines that are valid and odd, or not valid."""
    box = shop.box("deepseek", "try")
    verb = chance.choice(["eval", "eval", "search", "distill"])
    ways = {**_ODD, **_WRONG}
    way = chance.choice(list(ways))
    suffix, content = ways[way]
    path = box / "work" / f"data{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", errors="surrogatepass"))
    argv = [f"work/{path.name}" if word.startswith("work/") else word for word in words(verb)]
    check: Check | None = None
    must: bool | None = None
    if way in _ODD:
        # The same texts as plain JSON lines give the same windows.
        plain = box / "work" / "plain.jsonl"
        plain.write_text("\n".join(_GOOD) + "\n")
        must = False
        other = ["work/plain.jsonl" if word == f"work/{path.name}" else word for word in argv]
        check = _same_losses(contents_of(shop, box, other, f"plain {verb}"))
    elif way in _FATAL:
        must = True
    return Try(f"--data is {way}; {verb}", box, argv, must, (path.name, "text-field", "line"), check=check)


def contents_of(shop: Workshop, box: Path, argv: list[str], key: str) -> dict[str, str]:
    """What a run with other data writes; its output is gone afterwards."""
    if key not in shop.known:
        found = shop.run(box, argv)
        assert found.code == 0, found.err
        shop.known[key] = contents(box / "output")
        shop.discard(box / "output")
    return shop.known[key]


def _same_losses(expected: dict[str, str]) -> Check:
    def numbers(files: dict[str, str]) -> list[str]:
        found = []
        for name in ("evaluation.json", "patterns.json"):
            if name in files:
                document = json.loads(files[name])
                found += [str(document.get(key)) for key in ("perplexity", "patterns", "curve", "steps")]
        return found or [files.get("model.safetensors", "")]

    def check(shop: Workshop, box: Path, run: Run) -> list[str]:
        same = numbers(contents(box / "output")) == numbers(expected)
        return [] if same else ["the same texts, written otherwise, give other windows"]

    return check


def _records(change) -> str:
    return "\n".join(change(json.loads(line), number) for number, line in enumerate(_GOOD)) + "\n"


def _with(record: dict, **fields) -> str:
    return json.dumps({**record, **fields}, ensure_ascii=False)


# Valid JSON lines that say what the plain ones say.
_ODD: dict[str, tuple[str, str | bytes]] = {
    "U+2028 in another field": (".jsonl", _records(lambda r, n: _with(r, note="a\u2028b"))),
    "NEL in another field": (".jsonl", _records(lambda r, n: _with(r, note="a\x85b"))),
    "U+2028 between words": (".jsonl", _records(lambda r, n: _with(r, text=r["text"].replace(" ", "\u2028")))),
    "form feeds in another field": (".jsonl", _records(lambda r, n: json.dumps({**r, "note": "a\x0cb\x1cc"}))),
    "lines that end in CRLF": (".jsonl", "\r\n".join(_GOOD) + "\r\n"),
    "empty lines between": (".jsonl", "\n\n \n".join(_GOOD) + "\n\n"),
    "no line end at the end": (".jsonl", "\n".join(_GOOD)),
    "spaces round records": (".jsonl", _records(lambda r, n: f"  {json.dumps(r)}\t")),
    "escaped letters": (".jsonl", _records(lambda r, n: json.dumps(r).replace("w", "\\u0077"))),
    "large numbers in another field": (
        ".jsonl",
        _records(lambda r, n: json.dumps(r)[:-1] + ', "n": ' + "9" * 400 + "}"),
    ),
}
# Not what it should be; those of _FATAL cannot be taken for text.
_WRONG: dict[str, tuple[str, str | bytes]] = {
    "a null text": (".jsonl", _records(lambda r, n: _with(r, text=None) if n == 0 else json.dumps(r))),
    "a number as text": (".jsonl", _records(lambda r, n: _with(r, text=17))),
    "chat records": (
        ".jsonl",
        _records(lambda r, n: json.dumps({"messages": [{"role": "user", "content": r["text"]}]})),
    ),
    "chat records as text": (
        ".jsonl",
        _records(lambda r, n: json.dumps({"text": [{"role": "user", "content": r["text"]}]})),
    ),
    "a lone surrogate": (".jsonl", _records(lambda r, n: json.dumps({"text": "\ud800" + r["text"]}))),
    "a lone surrogate, not escaped": (".jsonl", _records(lambda r, n: _with(r, text="\ud800 " + r["text"]))),
    "not JSON in line 1": (".jsonl", "\n".join(["{", *_GOOD])),
    "a list a line": (".jsonl", "\n".join(f"[{line}]" for line in _GOOD)),
    "a string a line": (".jsonl", "\n".join(json.dumps(json.loads(line)["text"]) for line in _GOOD)),
    "one JSON list": (".jsonl", "[" + ",".join(_GOOD) + "]"),
    "deep nesting": (".jsonl", "\n".join(['{"text": ' + "[" * 90_000 + "]" * 90_000 + "}", *_GOOD])),
    "no field text": (".jsonl", _records(lambda r, n: json.dumps({"content": r["text"]}))),
    "an empty file": (".jsonl", ""),
    "white space": (".txt", " \n\t\n" * 50),
    "one word": (".txt", "w1"),
    "binary": (".txt", bytes(range(256)) * 40),
    "gzip": (".jsonl", b"\x1f\x8b\x08\x00" + bytes(range(200))),
    "UTF-16": (".txt", " ".join(f"w{n % 60}" for n in range(600)).encode("utf-16")),
    "one line of 6 MB": (".txt", " ".join(f"w{n % 60}" for n in range(1_600_000))),
    "one record of 6 MB": (".jsonl", json.dumps({"text": " ".join(f"w{n % 60}" for n in range(1_600_000))})),
    "one word of 6 MB": (".txt", "w" * 6_000_000),
    "no windows": (".safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "),
    "a truncated safetensors": (".safetensors", b"\xff\x00\x00\x00\x00\x00\x00\x00{"),
    "half numbers as ids": (".safetensors", b""),
    "ids beyond the vocabulary": (".safetensors", b""),
    "ids + 2^32": (".safetensors", b""),
    "negative ids": (".safetensors", b""),
    "ids of one dimension": (".safetensors", b""),
    "no rows of ids": (".safetensors", b""),
    "marks of another shape": (".safetensors", b""),
}
# The tokenizer has a chat template, which makes text of chat records; a null is left out; and of many records not
# every one is read.
_TAKEN = {"one line of 6 MB", "one record of 6 MB", "a lone surrogate", "chat records", "a null text"}
_FATAL = set(_WRONG) - _TAKEN - {"not JSON in line 1", "deep nesting"}


def _windows(values: list, dtype: str, shape: list[int], marks: list[int] | None = None) -> bytes:
    import struct

    packed = struct.pack(f"<{len(values)}{'f' if dtype == 'F32' else 'q'}", *values)
    header = {"calibration_ids": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(packed)]}}
    if marks is not None:
        header["calibration_recall"] = {"dtype": "U8", "shape": marks, "data_offsets": [len(packed)] * 2}
        header["calibration_recall"]["data_offsets"][1] += (size := marks[0] * marks[1])
        packed += bytes(size)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + packed


_IDS = [(7 * n) % 60 for n in range(8 * 25)]
_WRONG |= {
    "half numbers as ids": (".safetensors", _windows([n + 0.5 for n in _IDS], "F32", [8, 25])),
    "ids beyond the vocabulary": (".safetensors", _windows([n + 60 for n in _IDS], "I64", [8, 25])),
    "ids + 2^32": (".safetensors", _windows([n + 2**32 for n in _IDS], "I64", [8, 25])),
    "negative ids": (".safetensors", _windows([n - 1 for n in _IDS], "I64", [8, 25])),
    "ids of one dimension": (".safetensors", _windows(_IDS, "I64", [200])),
    "no rows of ids": (".safetensors", _windows([], "I64", [0, 25])),
    "marks of another shape": (".safetensors", _windows(_IDS, "I64", [8, 25], [8, 9])),
}


# ---- options ------------------------------------------------------------------------------------------------------

_ODD_WORDS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e400",
    "",
    " ",
    "1/0",
    "0/0",
    "2147483648",
    "9" * 400,
    "٣",
    "[x]",
    "½",
    "--",
    "x" * 5000,
    "\udcff",
    "\x1b[2J",
    "true",
    "None",
    "1,2",
    "0x10",
    "1_0",
    "/dev/null",
    "..",
    "~",
    "$HOME",
    "%s%n",
    "{}",
    "a\nb",
]
_OPTIONS = {
    "convert": ["--keep", "--pattern", "--pattern-file", "--max-shard-size", "--dtype", "--revision", "--token"],
    "eval": [
        "--seqlen",
        "--nsamples",
        "--seed",
        "--task",
        "--pattern",
        "--device",
        "--dtype",
        "--batch-size",
        "--data",
        "--text-field",
        "--length",
        "--samples",
        "--depths",
    ],
    "search": [
        "--keep",
        "--tolerance",
        "--seqlen",
        "--nsamples",
        "--seed",
        "--cache-memory",
        "--refine",
        "--blocks",
        "--held-out",
        "--baseline",
        "--device",
        "--path-rounds",
    ],
    "distill": [
        "--keep",
        "--learning-rate",
        "--dense-learning-rate",
        "--kl-weight",
        "--weight-decay",
        "--max-grad-norm",
        "--warmup-ratio",
        "--seqlen",
        "--batch-size",
        "--lora-rank",
        "--index-topk",
        "--seed",
        "--save-steps",
        "--logging-steps",
        "--held-out",
    ],
    "generate": ["--max-new-tokens", "--temperature", "--top-p", "--seed", "--pattern", "--device"],
    "inspect": ["--overlap", "--seqlen", "--nsamples", "--overlap-picture", "--revision"],
    "plan": ["--gpus", "--gpu", "--memory", "--length", "--batch", "--pattern", "--prefill-chunk", "--revision"],
    "export": ["--to", "--keep"],
    "push": ["--revision", "--commit-message"],
}
# Every step of these costs as much as it says, and a value of millions is the user's own wish.
_COSTLY = {"--max-new-tokens", "--batch-size", "--samples", "--depths", "--length", "--index-topk", "--lora-rank"}


def options(shop: Workshop, chance: random.Random) -> Try:
    """Values of options that mean nothing, or nothing good."""
    box = shop.box("deepseek", "try")
    verb = chance.choice([*_OPTIONS, "eval", "search", "distill"])
    option, value = chance.choice(_OPTIONS[verb]), chance.choice(_ODD_WORDS)
    if option in _COSTLY and len(value) > 9:
        value = "nan"
    if verb == "generate" and option == "--pattern":
        argv = words(verb, source="converted")
    else:
        argv = words(verb)
    if option in argv:
        at = argv.index(option)
        del argv[at : at + 2]
    if option == "--pattern" and "--keep" in argv:
        del argv[argv.index("--keep") : argv.index("--keep") + 2]
    argv.append(f"{option}={value}")
    if verb == "generate" and option in ("--temperature", "--top-p"):
        argv.append("--sample")
    must = True if value in ("nan", "inf", "-inf", "1e400") and option not in _WORDS else None
    names = (
        option,
        option.strip("-").replace("-", "_"),
        value[:20],
        repr(value)[:20],
        ascii(value)[1:20],
        "pattern",
        "output",
        "source",
        "tester/pushed",
    )
    return Try(f"{verb} {option} {value[:60]!a}", box, argv, must, names)


# Options that take any word.
_WORDS = {"--text-field", "--commit-message", "--token", "--revision", "--pattern-file", "--overlap-picture"}


KINDS = {
    "pattern_file": pattern_file,
    "recipe": recipe,
    "journal": journal,
    "damaged_output": damaged_output,
    "data": data,
    "options": options,
}
