"""One try: a sandbox with something wrong in it, a verb that meets it, and the findings."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import rules
from rules import strict_json
from workshop import Run, Workshop

Check = Callable[[Workshop, Path, Run], list[str]]

_SMALL = "--data work/text.txt --seqlen 16 --nsamples 2 --no-pictures --device cpu"
# The least that each verb does its work with. `source` is the checkpoint under test.
VERBS: dict[str, str] = {
    "convert": "convert source output --keep 1/2",
    "convert copy": "convert source output --pattern FSSF --copy",
    "convert cast": "convert source output --keep 1/2 --dtype float32 --max-shard-size 100KB",
    "convert reshard": "convert source output --keep 2 --max-shard-size 60KB --keep-shared-indexers --json",
    "dry run": "convert source output --keep 1/2 --dry-run --json",
    "inspect": "inspect source",
    "inspect json": "inspect source --json",
    "plan": "plan source --gpus 2",
    "plan json": "plan source --json",
    "verify": "verify source converted",
    "eval": f"eval source {_SMALL} --task perplexity --output output",
    "search": f"search source {_SMALL} --keep 2 --no-curve --output output",
    "generate": "generate source w1 --max-new-tokens 2 --device cpu",
    "distill": (
        "distill source output --data work/windows.safetensors --seqlen 16 --keep 2 --dense-steps 1 --sparse-steps 1 "
        "--precision fp32 --device cpu --no-tensorboard --save-steps 1"
    ),
    "push": "push converted tester/pushed",
    "export": "export converted output --to vllm",
    "refresh": "refresh converted",
}


def words(verb: str, **instead: str) -> list[str]:
    """A verb's command line, some words of it replaced."""
    return [instead.get(word, word) for word in VERBS[verb].split()]


@dataclass
class Try:
    """What is tried.

    Attributes:
        what: what is wrong, in words.
        box: the sandbox, prepared.
        argv: the verb.
        must_fail: True, False (must succeed), or None where either is right.
        names: strings of which an error must name one.
        writable: what may change: paths in the sandbox.
        check: more to check after exit code 0.
        always: more to check, however it ended.
        fault: for the child, see `faults.py`.
    """

    what: str
    box: Path
    argv: list[str]
    must_fail: bool | None = None
    names: tuple[str, ...] = ()
    writable: tuple[str, ...] = ("output",)
    check: Check | None = None
    always: Check | None = None
    fault: dict | None = None
    environment: dict[str, str] = field(default_factory=dict)


Maker = Callable[[Workshop, random.Random], Try]


@dataclass(frozen=True)
class Verdict:
    """A try and what it broke; no findings where it broke nothing."""

    kind: str
    seed: int
    number: int
    what: str
    argv: list[str]
    findings: list[str]
    code: int | None
    wall: float

    @property
    def command(self) -> str:
        """Repeats it."""
        return f"make hostile SEED={self.seed} ONLY={self.kind}:{self.number}"

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.what}", "  indexcache " + " ".join(map(ascii_word, self.argv))]
        return "\n".join([*lines, *(f"  - {finding}" for finding in self.findings), f"  again: {self.command}"])


def ascii_word(word: str) -> str:
    """A word of a command line as it can be shown."""
    return word if re.fullmatch(r"[\w./:,=-]+", word, re.ASCII) else ascii(word)


def chance_of(seed: int, kind: str, number: int) -> random.Random:
    """All that a try leaves to chance."""
    return random.Random(f"{seed}/{kind}/{number}")


def carry_out(shop: Workshop, kind: str, maker: Maker, seed: int, number: int) -> Verdict:
    """Prepare, run, judge, clear away."""
    shop.hub.empty()
    tried = maker(shop, chance_of(seed, kind, number))
    before = rules.snapshot(tried.box)
    run = shop.run(tried.box, tried.argv, tried.fault, **tried.environment)
    findings = judge(shop, tried, run, before)
    shop.discard(tried.box)
    shop.hub.empty()
    return Verdict(kind, seed, number, tried.what, tried.argv, findings, run.code, run.wall)


def judge(shop: Workshop, tried: Try, run: Run, before: dict[str, rules.Entry]) -> list[str]:
    """Every rule on one run."""
    killed = run.code is None
    findings = rules.ending(run, tried.must_fail) + rules.message(run, tried.names)
    findings += rules.touched(before, rules.snapshot(tried.box), tried.writable, killed)
    findings += rules.kept_in(tried.box, tried.writable)
    if tried.always is not None:
        findings += tried.always(shop, tried.box, run)
    if run.code == 0:
        try:
            findings += result(shop, tried.box, tried.argv, run)
        except RuntimeError as error:
            findings.append(f"what is called done cannot be checked: {str(error)[-300:]}")
        if tried.check is not None:
            findings += tried.check(shop, tried.box, run)
    else:
        for output in tried.writable:
            findings += rules.left_behind(tried.box, output, before, killed)
    return list(dict.fromkeys(findings))


def result(shop: Workshop, box: Path, argv: list[str], run: Run) -> list[str]:
    """What a verb that says it is done must have done."""
    found: list[str] = []
    if "--json" in argv:
        try:
            strict_json(run.out)
        except ValueError as error:
            found.append(f"--json prints no JSON: {error}")
    if argv[0] == "convert" and "--dry-run" not in argv and (box / argv[1]).is_dir():
        keeps, exact = "--keep-shared-indexers" in argv, "--dtype" not in argv
        found += shop.call("checks:converted", str(box / argv[1]), str(box / argv[2]), exact, keeps)
    if argv[0] == "export" and (box / argv[1]).is_dir():
        found += shop.call("checks:converted", str(box / argv[1]), str(box / argv[2]), True, False, False)
    if argv[0] == "distill":
        found += shop.call("checks:loads", str(box / argv[2]), str(box / argv[1]))
        found += shop.call("checks:finite", str(box / argv[2]))
    if "--output" in argv:
        for path in (box / argv[argv.index("--output") + 1]).glob("*.json"):
            if not path.is_file():  # a pipe that a try has put there
                continue
            try:
                strict_json(path.read_text(encoding="utf-8"))
            except ValueError as error:
                found.append(f"{path.name} is no JSON: {error}")
    return found


def same_result(shop: Workshop, box: Path, argv: list[str], key: str) -> Check:
    """A check that a run gave what an undisturbed one gives."""
    expected = undisturbed(shop, box, argv, key)

    def check(shop: Workshop, box: Path, run: Run) -> list[str]:
        return differences(expected, contents(box / output_of(argv)))

    return check


def undisturbed(shop: Workshop, box: Path, argv: list[str], key: str) -> dict[str, str]:
    """What a verb writes when nothing is wrong, run once in a copy of this sandbox's kind."""
    if key not in shop.known:
        found = shop.run(box, argv)
        if found.code != 0:
            raise RuntimeError(f"{argv} fails undisturbed: {found.err}")
        shop.known[key] = contents(box / output_of(argv))
        shop.discard(box / output_of(argv))
    return shop.known[key]


def output_of(argv: list[str]) -> str:
    """The output folder of a command line."""
    return argv[argv.index("--output") + 1] if "--output" in argv else argv[2]


# What may differ between two runs of a command: when, how long, on what, how much came from a journal.
_VARYING = (
    "date",
    "seconds",
    "evaluations_resumed",
    "evaluations_from_journal",
    "seconds_a_step",
    "device",
    "warnings",
)
# Of `versions`, what says where and when a run was made: `faults.py` gives a child one core to be told of.
_VARYING_VERSIONS = ("device", "cpu", "threads", "date", "commit")


def contents(folder: Path) -> dict[str, str]:
    """Files of an output as they can be compared: text, or a digest; without journals and times."""
    found = {}
    for name, entry in rules.snapshot(folder).items():
        if entry.kind != "file" or name.startswith(("runs/", "training/", "journal.jsonl")):
            continue
        found[name] = entry.content
        if name in ("evaluation.json", "patterns.json", "training_log.json"):
            try:
                document = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError:
                continue
            found[name] = json.dumps(_without_varying(document), sort_keys=True)
    return found


def _without_varying(value, omitted: tuple[str, ...] = _VARYING):
    if isinstance(value, dict):
        return {
            key: _without_varying(part, _VARYING_VERSIONS if key == "versions" else _VARYING)
            for key, part in value.items()
            if key not in omitted
        }
    return [_without_varying(part) for part in value] if isinstance(value, list) else value


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """How a result differs from the undisturbed one."""
    wrong = [f"{name} is missing from the result" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} is too much in the result" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            wrong.append(f"{name} differs from the undisturbed result{_where(expected[name], found[name])}")
    return wrong


def _where(expected: str, found: str) -> str:
    if not expected.startswith("{"):
        return ""
    at = next(
        (at for at, pair in enumerate(zip(expected, found)) if pair[0] != pair[1]), min(len(expected), len(found))
    )
    return f": {expected[max(0, at - 60) : at + 30]!r} became {found[max(0, at - 60) : at + 30]!r}"


def combined(*checks: Check | None) -> Check:
    """All of them."""

    def check(shop: Workshop, box: Path, run: Run) -> list[str]:
        return [finding for one in checks if one is not None for finding in one(shop, box, run)]

    return check
