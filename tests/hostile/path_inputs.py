"""Tries of where things are read and written: strange names, links, permissions, one output for two."""

from __future__ import annotations

import os
import random
import shutil
import stat
from pathlib import Path

import rules
from tries import Try, contents, differences, output_of, undisturbed, words
from workshop import Run, Workshop

WRITERS = ["convert", "convert", "convert cast", "export", "search", "eval", "distill"]


def output_path(shop: Workshop, chance: random.Random) -> Try:
    """Where an output cannot be, or is hard to be."""
    box = shop.box("deepseek", "try")
    verb = chance.choice(WRITERS)
    source = "converted" if verb == "export" else "source"
    must: bool | None = None
    way = chance.choice(
        [
            "in the source",
            "the source",
            "above the source",
            "a file",
            "a link to the source",
            "a link to a folder",
            "a link to nothing",
            "a device",
            "no parent",
            "below a file",
            "read-only parent",
            "read-only",
            "odd name",
            "a long name",
            "a NUL",
            "empty",
            "foreign files",
            "a pipe in it",
            "dots",
            "below a link into the source",
        ]
    )
    output, writable = "output", ("output",)
    if way == "in the source":
        output, must, writable = f"{source}/inside", True, ()
    elif way == "the source":
        output, must, writable = source, True, ()
    elif way == "above the source":
        output, must, writable = ".", True, ()
    elif way == "a file":
        (box / "output").write_text("mine")
        must, writable = True, ()
    elif way == "a link to the source":
        (box / "output").symlink_to(source)
        must, writable = True, ()
    elif way == "a link to a folder":
        (box / "elsewhere").mkdir()
        (box / "output").symlink_to("elsewhere")
        writable = ("elsewhere",)
    elif way == "a link to nothing":
        (box / "output").symlink_to("nothing")
        writable = ("output", "nothing")
    elif way == "a device":
        output, must, writable = "/dev/null", True, ()
    elif way == "no parent":
        output, writable = "new/deep/output", ("new",)
    elif way == "below a file":
        output, must, writable = "work/text.txt/output", True, ()
    elif way == "read-only parent":
        (box / "locked").mkdir(mode=0o500)
        output, must, writable = "locked/output", True, ()
    elif way == "read-only":
        (box / "output").mkdir(mode=0o500)
        must, writable = True, ()
    elif way == "odd name":
        output = chance.choice(
            [
                "[bold]out[/bold]",
                "[/]",
                "out put",
                "ausgabe \u00e9\u4e2d",
                "out'\"$(x)`",
                "./-o",
                "out\nput",
                "\udcff\udcfe",
                "%s",
                "a" * 200,
                "\x1b[2J",
                "out.json",
                "~",
                "*",
            ]
        )
        writable = (os.path.normpath(output).split("/")[0],)
    elif way == "a long name":
        output, must, writable = "o" * 300, True, ()
    elif way == "a NUL":
        output, must, writable = "out\0put", True, ()
    elif way == "empty":
        output, must, writable = "", True, ()
    elif way == "foreign files":
        (box / "output").mkdir()
        (box / "output" / "mine.txt").write_text("mine")
        must = True if verb not in ("search", "eval") else None
    elif way == "a pipe in it":
        (box / "output").mkdir()
        os.mkfifo(box / "output" / chance.choice(["config.json", "journal.jsonl", ".indexcache_convert.json", "x"]))
    elif way == "dots":
        output = "work/../output/./"
    else:
        (box / "there").symlink_to(source)
        output, must, writable = "there/new", True, ()
    if verb in ("search", "eval"):
        # These write into any folder, the source's own too if asked: it is a folder of results.
        must = (
            True
            if must
            and way in ("a file", "a device", "below a file", "read-only parent", "read-only", "a long name", "a NUL")
            else None
        )
        if way in (
            "in the source",
            "the source",
            "above the source",
            "a link to the source",
            "below a link into the source",
            "empty",
        ):
            return output_path(shop, chance)
    argv = [output if word == "output" else word for word in words(verb)]
    names = (*_shown(output or "''"), "output", source)
    check = _foreign_stays if way == "foreign files" else None
    return Try(f"output {way} ({output[:40]!a}); {verb}", box, argv, must, names, writable, always=check)


def _shown(path: str) -> tuple[str, ...]:
    return tuple(part for part in (path[:60], ascii(path)[1:60].rstrip("'"), repr(path)[1:60].rstrip("'")) if part)


def _foreign_stays(shop: Workshop, box: Path, run: Run) -> list[str]:
    kept = box / "output" / "mine.txt"
    return [] if kept.exists() and kept.read_text() == "mine" else ["a file of somebody else in the output is gone"]


def source_path(shop: Workshop, chance: random.Random) -> Try:
    """A source of a strange name, in a strange place, or that is none."""
    box = shop.box("deepseek", "try")
    verb = chance.choice(["convert", "inspect", "eval", "generate", "verify", "search", "distill", "export", "push"])
    old = "converted" if verb in ("export", "push") else "source"
    way = chance.choice(
        [
            "renamed",
            "renamed",
            "gone",
            "a file",
            "a link",
            "unreadable",
            "no entry",
            "a pipe",
            "a shard",
            "config alone",
        ]
    )
    new, must = old, None
    if way == "renamed":
        new = chance.choice(
            [
                "[red]x",
                "[/x]",
                "a b",
                "\u00e9\u4e2d\U0001f600",
                "a\nb",
                "x\udcff",
                "org/name",
                "%(x)s",
                "n" * 200,
                "\x1b[2J",
                "model.safetensors",
                "a:b",
            ]
        )
        (box / new).parent.mkdir(exist_ok=True)
        shutil.move(box / old, box / new)
        must = False if not set(new) & set("\udcff") else None
    elif way == "gone":
        new, must = (
            chance.choice(
                ["nowhere", "nobody/nothing", "a/b/c", "", "/", "\0", "file:///x", "https://x/y", "-", "[x]"]
            ),
            True,
        )
    elif way == "a file":
        new, must = "work/text.txt", True
    elif way == "a link":
        (box / "there").symlink_to(old)
        new, must = "there", False
    elif way == "unreadable":
        victim = chance.choice(sorted((box / old).glob("*.json")) + sorted((box / old).glob("*.safetensors")))
        victim.chmod(0)
    elif way == "no entry":
        (box / old).chmod(0)
        must = True
    elif way == "a pipe":
        os.mkfifo(box / "pipe")
        new, must = "pipe", True
    elif way == "a shard":
        new, must = f"{old}/model-00001-of-00003.safetensors", True
    else:
        for path in (box / old).glob("*.safetensors"):
            path.unlink()
        must = True
    argv = [new if word == old else word for word in words(verb)]
    if new == "-":
        argv = [argv[0], "--", *argv[1:]] if verb == "generate" else argv
    names = (*_shown(new or "''"), old, "model-0000", "json", "Hub")
    writable: tuple[str, ...] = ("output",)
    return Try(f"source {way} ({new[:40]!a}); {verb}", box, argv, must, names, writable)


def private_source(shop: Workshop, chance: random.Random) -> Try:
    """What only its owner may read stays so when it is written anew."""
    box = shop.box("deepseek", "try")
    verb = chance.choice(["convert", "convert cast", "convert copy", "distill", "export"])
    source = box / ("converted" if verb == "export" else "source")
    for path in source.rglob("*"):
        if path.is_file():
            path.chmod(0o600)

    def check(shop: Workshop, box: Path, run: Run) -> list[str]:
        private = [path for path in (box / "output").rglob("*") if path.suffix == ".safetensors"]
        private += [box / "output" / name for name in ("tokenizer.json",)]
        return [
            f"{path.name} of a source with mode 0600 has mode {stat.S_IMODE(path.stat().st_mode):o}"
            for path in private
            if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077
        ]

    return Try(f"a source of mode 0600; {verb}", box, words(verb), False, ("output",), check=check)


def two_writers(shop: Workshop, chance: random.Random) -> Try:
    """Another process writes the same output meanwhile: one of them is refused, the output is right."""
    box = shop.box("deepseek", "try")
    verb = chance.choice(["convert", "convert cast", "convert copy", "export", "search", "eval"])
    first = words(verb)
    expected = undisturbed(shop, box, first, f"undisturbed {verb}")
    second = list(first)
    if chance.random() < 0.5 and "--keep" in second and verb.startswith("convert"):
        second[second.index("--keep") + 1] = "1"
    second += chance.choice([[], ["--resume"], ["--overwrite"]]) if verb != "export" else []
    at = chance.randrange(1, 30)
    mark = str(box / "tmp" / "paused")

    def check(shop: Workshop, box: Path, run: Run) -> list[str]:
        one, two = shop.run_together(
            box, [(first, {"kind": "pause", "at": at, "file": mark}, None), (second, None, mark)]
        )
        for path in (mark, mark + ".go"):
            Path(path).unlink(missing_ok=True)
        found = [
            f"the first: {finding}" for finding in rules.ending(one, None) + rules.message(one, ("output", "source"))
        ]
        found += [
            f"the second: {finding}" for finding in rules.ending(two, None) + rules.message(two, ("output", "source"))
        ]
        here = contents(box / output_of(first))
        if one.code == 0 and two.code != 0:
            found += differences(expected, here)
        if one.code == 0 and two.code == 0 and first[:4] == second[:4]:
            found += differences(expected, here)
        if one.code == 0 and two.code == 0 and first[:4] != second[:4]:
            found.append("two different conversions into one folder both call it done")
        if one.code != 0 and two.code != 0:
            again = shop.run(box, [*first, *(["--resume"] if verb != "export" else [])])
            if again.code not in (0, 1, 2) or "Traceback" in again.err:
                found.append(f"after both failed, --resume: {again.code} {again.err[-200:]}")
        return found

    # The try's own run shows nothing; the two run in the check, which every ending is judged by.
    return Try(
        f"{' '.join(first)} paused at change {at}; {' '.join(second)}",
        box,
        ["env"],
        None,
        (),
        ("output", "tmp"),
        check=check,
    )


KINDS = {
    "output_path": output_path,
    "source_path": source_path,
    "private_source": private_source,
    "two_writers": two_writers,
}
