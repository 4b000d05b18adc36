"""Tries in which a Hub, or what stands before it, answers wrongly."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from faulty_hub import HTML, WrongAnswer
from tries import Try, same_result, words
from workshop import Run, Workshop

SOURCE, PUSHED = "maker/source", "tester/pushed"
_FILE = rf"^/{SOURCE}/resolve/"
_API = rf"^/api/models/{SOURCE}"


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def reading(shop: Workshop, chance: random.Random) -> Try:
    """A checkpoint on a Hub: every byte is the commit's, or the verb says no."""
    template = chance.choice(["deepseek", "deepseek", "glm"])
    box = shop.box(template, "try")
    shop.hub.put(SOURCE, box / "source")
    verb = chance.choice(
        ["convert", "convert", "convert cast", "convert copy", "inspect", "eval", "verify", "dry run"]
    )
    argv = words(verb, source=SOURCE)
    file = chance.choice(
        [
            "model.*safetensors$",
            "model.*safetensors$",
            "config.json$",
            "tokenizer.json$",
            "tokenizer_config.json$",
            ".*",
            "index.json$",
            "README.md$",
        ]
    )
    what, wrong, must = _wrong_answer(chance, _FILE + ".*" + file if file != ".*" else _FILE)
    check = _right_bytes if argv[0] == "convert" and "--dry-run" not in argv else None
    if verb == "eval":
        check = same_result(shop, box, argv, f"undisturbed eval of {template} on the Hub")
    # What an earlier try has fetched would be taken from the client's cache.
    shutil.rmtree(shop.folder / "hf_home" / "hub", ignore_errors=True)
    shop.hub.wrong.append(wrong)
    names = (SOURCE, "Hub", "127.0.0.1")
    return Try(
        f"{what} for {file} ({wrong.times} times after {wrong.skip}); {verb}",
        box,
        argv,
        must,
        names,
        check=check,
    )


def _wrong_answer(chance: random.Random, path: str) -> tuple[str, WrongAnswer, bool | None]:
    """What is wrong, how, and whether the verb must fail (None) or get over it (False)."""
    times, skip = chance.choice([(1, 0), (1, 1), (1, 3), (2, 0), (10**9, 0), (10**9, 1)]), 0
    times, skip = times
    once = times <= 2
    methods = "GET"
    ways: dict[str, tuple[dict, bool | None]] = {
        "204": ({"status": 204}, None),
        "200 without the range": ({"status": 200, "ignore_range": True}, None),
        "a 206 of the whole": ({"status": 206, "ignore_range": True}, None),
        "a shifted body": ({"body": lambda data: data[1:] + b"\0"}, None),
        "a body too short": ({"body": lambda data: data[:-1]}, None),
        "a body too long": ({"body": lambda data: data + b"\0"}, None),
        "an empty body": ({"body": lambda data: b""}, None),
        "HTML": ({"body": lambda data: HTML, "headers": {"Content-Type": "text/html"}}, None),
        "a flipped bit": ({"body": lambda data: _flip(data, chance)}, None),
        "zeros": ({"body": lambda data: bytes(len(data))}, None),
        "a connection that breaks": ({"cut": chance.random()}, None),
        "429": ({"status": 429, "headers": {"Retry-After": "1"}}, not once),
        "500": ({"status": 500}, not once),
        "502": ({"status": 502}, not once),
        "503 with Retry-After": ({"status": 503, "headers": {"Retry-After": "1"}}, not once),
        "503 with a date": ({"status": 503, "headers": {"Retry-After": "Wed, 21 Oct 2030 07:28:00 GMT"}}, None),
        "429 for a day": ({"status": 429, "headers": {"Retry-After": "86400"}}, None),
        "401": ({"status": 401}, None),
        "403": ({"status": 403}, None),
        "404": ({"status": 404}, None),
        "416": ({"status": 416}, None),
        "a wrong Content-Range": ({"headers": {"Content-Range": "bytes 0-1/2"}}, None),
        "no Content-Range": ({"headers": {"Content-Range": None}}, None),
        "another commit": ({"headers": {"X-Repo-Commit": "0" * 40}}, None),
        "another ETag": ({"headers": {"ETag": '"0"', "X-Linked-Etag": '"0"'}}, None),
        "a wrong linked size": ({"headers": {"X-Linked-Size": "1"}}, None),
    }
    way = chance.choice(list(ways))
    if way in ("another commit", "another ETag", "a wrong linked size"):
        methods = "GET|HEAD"
    fields, must = ways[way]
    # A file that is not read at all cannot fail.
    return way, WrongAnswer(methods, path, times=times, skip=skip, **fields), must if must is False else None


def listing(shop: Workshop, chance: random.Random) -> Try:
    """What the Hub says about a repository before the first byte."""
    box = shop.box("deepseek", "try")
    shop.hub.put(SOURCE, box / "source")
    verb = chance.choice(["convert", "convert cast", "inspect", "dry run"])

    def change(edit: Callable[[dict], None]) -> Callable[[bytes], bytes]:
        def body(data: bytes) -> bytes:
            answer = json.loads(data)
            if isinstance(answer, dict):
                edit(answer)
            return json.dumps(answer).encode()

        return body

    ways: dict[str, Callable[[bytes], bytes]] = {
        "the commit is null": change(lambda answer: answer.update(sha=None)),
        "the commit is missing": change(lambda answer: answer.pop("sha", None)),
        "the commit is main": change(lambda answer: answer.update(sha="main")),
        "the commit is a path": change(lambda answer: answer.update(sha="../../x")),
        "the commit is a number": change(lambda answer: answer.update(sha=7)),
        "no files": change(lambda answer: answer.update(siblings=[])),
        "files are null": change(lambda answer: answer.update(siblings=None)),
        "files without sizes": change(lambda answer: [file.pop("size", None) for file in answer.get("siblings", ())]),
        "sizes one too large": change(
            lambda answer: [
                file.update(size=file["size"] + 1) for file in answer.get("siblings", ()) if "size" in file
            ]
        ),
        "sizes as text": change(lambda answer: [file.update(size="many") for file in answer.get("siblings", ())]),
        "negative sizes": change(lambda answer: [file.update(size=-1) for file in answer.get("siblings", ())]),
        "a file outside": change(
            lambda answer: answer["siblings"].append({"rfilename": "../../outside/x", "size": 3})
        ),
        "an absolute file": change(lambda answer: answer["siblings"].append({"rfilename": "/tmp/x", "size": 3})),
        "a file that is not there": change(
            lambda answer: answer["siblings"].append({"rfilename": "LICENSE.more", "size": 3, "blobId": "0" * 40})
        ),
        "a file twice": change(lambda answer: answer["siblings"].extend(answer["siblings"][:3])),
        "wrong blob ids": change(lambda answer: [file.update(blobId="0" * 40) for file in answer.get("siblings", ())]),
        "HTML": lambda data: HTML,
        "nothing": lambda data: b"",
        "a list": lambda data: b"[]",
        "null": lambda data: b"null",
        "half of it": lambda data: data[: len(data) // 2],
    }
    way = chance.choice(list(ways))
    shop.hub.wrong.append(WrongAnswer("GET", _API + r"(/revision/[^/]+)?$", body=ways[way]))
    check = _right_bytes if verb.startswith("convert") else None
    argv = words(verb, source=SOURCE)
    return Try(f"listing: {way}; {verb}", box, argv, None, (SOURCE, "Hub", "127.0.0.1"), check=check)


def pushing(shop: Workshop, chance: random.Random) -> Try:
    """A push into a Hub that does not take it: no half commit, and a second push ends it."""
    box = shop.box(chance.choice(["deepseek", "glm"]), "try")
    places = {
        "create": ("POST", "^/api/repos/create$"),
        "preupload": ("POST", "/preupload/"),
        "batch": ("POST", "/info/lfs/objects/batch$"),
        "put": ("PUT", "^/_lfs/"),
        "verify": ("POST", "^/_lfs/.*/verify$"),
        "commit": ("POST", "/commit/main$"),
        "card check": ("POST", "^/api/validate-yaml$"),
        "info": ("GET", rf"^/api/models/{PUSHED}"),
        "whoami": ("GET", "^/api/whoami-v2$"),
    }
    place = chance.choice(list(places))
    way, fields = chance.choice(
        [
            ("400", {"status": 400}),
            ("401", {"status": 401}),
            ("403", {"status": 403}),
            ("404", {"status": 404}),
            ("409", {"status": 409}),
            ("412", {"status": 412}),
            ("413", {"status": 413}),
            ("429", {"status": 429, "headers": {"Retry-After": "1"}}),
            ("500", {"status": 500}),
            ("503", {"status": 503, "headers": {"Retry-After": "0"}}),
            ("204", {"status": 204}),
            ("HTML", {"body": lambda data: HTML}),
            ("nothing", {"body": lambda data: b""}),
            ("null", {"body": lambda data: b"null"}),
            ("an empty object", {"body": lambda data: b"{}"}),
            ("a broken connection", {"cut": 0.5}),
        ]
    )
    method, path = places[place]
    times = chance.choice([1, 1, 3, 10**9])
    shop.hub.wrong.append(WrongAnswer(method, path, times=times, **fields))
    names = (PUSHED, "Hub", "127.0.0.1", "README.md")
    return Try(f"push: {way} for {place}, {times} times", box, words("push"), None, names, (), always=_whole_commit)


def _whole_commit(shop: Workshop, box: Path, run: Run) -> list[str]:
    """The Hub holds everything or nothing; nothing that failed is called pushed; the next push ends it."""
    found = _state(shop, box, run.code == 0)
    shop.hub.wrong.clear()
    again = shop.run(box, words("push"))
    if again.code != 0:
        return [*found, f"pushed again, with a Hub that works: exit code {again.code}: {again.err[-300:]}"]
    return found + _state(shop, box, True)


def _state(shop: Workshop, box: Path, done: bool) -> list[str]:
    files = shop.hub.files(PUSHED) or {}
    weights = {path.name for path in (box / "converted").glob("*.safetensors")} | {"config.json"}
    there = weights & files.keys()
    if there and there != weights:
        return [f"half a commit on the Hub: {sorted(there)} of {sorted(weights)}"]
    if done and not there:
        return ["said to be pushed, and not on the Hub"]
    return [
        f"{name} on the Hub has other bytes"
        for name in sorted(there)
        if files[name] != (box / "converted" / name).read_bytes()
    ]


def _right_bytes(shop: Workshop, box: Path, run: Run) -> list[str]:
    """An output that came from the Hub holds what the repository holds: the source's folder."""
    exact = "--dtype" not in run.argv
    found = shop.call("checks:converted", str(box / "source"), str(box / "output"), exact)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        "encoding/encoding_dsv32.py",
    ):
        here, there = box / "output" / name, box / "source" / name
        if there.exists() and not here.exists():
            found.append(f"{name} of the Hub is lost")
        elif there.exists() and here.read_bytes() != there.read_bytes():
            found.append(f"{name} has other bytes than on the Hub")
    written = (box / "output" / "README.md").read_text() + (box / "output" / "indexcache_recipe.json").read_text()
    commit = shop.hub.repos["model", SOURCE].refs["main"]
    if commit not in written:
        found.append("card and recipe do not name the commit that was read")
    return found


KINDS = {"hub_reading": reading, "hub_listing": listing, "hub_pushing": pushing}
