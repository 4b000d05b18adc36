"""Long verbs are stopped anywhere: killed, interrupted, out of disk. Gone on with, each ends as if undisturbed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rules
from hub_inputs import SOURCE
from tries import Verdict, chance_of, contents, differences, output_of, words
from workshop import Run, Workshop

PUSHED = "tester/pushed"
# A run that is stopped is gone on with, and the next one may be stopped too, so often.
MOST_STOPS = 4


@dataclass(frozen=True)
class Scenario:
    """A verb that can be stopped.

    Attributes:
        argv: its command line.
        again: what goes on with it.
        template: of the sandbox.
        prepare: done to the sandbox first.
        on_hub: what it writes is on the Hub.
        from_hub: its source is.
        in_place: it changes this folder; else it writes the output of its command line.
    """

    argv: tuple[str, ...]
    again: tuple[str, ...]
    template: str = "deepseek"
    prepare: Callable[[Workshop, Path], None] | None = None
    on_hub: bool = False
    from_hub: bool = False
    in_place: str | None = None

    @property
    def output(self) -> str:
        """What it may write."""
        return self.in_place or output_of(list(self.argv))


def _resumed(verb: str, *more: str, template: str = "deepseek", **options) -> Scenario:
    argv = (*words(verb), *more)
    return Scenario(argv, (*argv, "--resume"), template, **options)


def _repeated(verb: str, *more: str, **options) -> Scenario:
    argv = (*words(verb), *more)
    return Scenario(argv, argv, **options)


def _earlier_conversion(shop: Workshop, box: Path) -> None:
    found = shop.run(box, ["convert", "source", "output", "--pattern", "FFSS", "--max-shard-size", "50KB"])
    assert found.code == 0, found.err


def _on_hub(shop: Workshop, box: Path) -> None:
    shop.hub.put(SOURCE, box / "source")


def _old_code(shop: Workshop, box: Path) -> None:
    """An older release's checkpoint: its version in every file, one that has gone since, one not yet there."""
    folder = box / "converted"
    version = json.loads((folder / "config.json").read_text())["indexcache_version"]
    for path in [*folder.glob("*.py"), folder / "config.json"]:
        text = path.read_text().replace(version, "0.0.1", 1)
        path.unlink()
        path.write_text(text)
    shutil.copy(folder / "share_pattern.py", folder / "gone_since.py")
    (folder / "module_sections.py").unlink()


SCENARIOS: dict[str, tuple[int, Scenario]] = {
    "convert": (3, _resumed("convert")),
    "convert_cast": (3, _resumed("convert cast")),
    "convert_copy": (1, _resumed("convert copy")),
    "convert_fp8": (1, _resumed("convert cast", template="fp8")),
    "convert_over": (2, _resumed("convert cast", "--overwrite", prepare=_earlier_conversion)),
    "convert_from_hub": (
        2,
        Scenario(
            tuple(words("convert cast", source=SOURCE)),
            (*words("convert cast", source=SOURCE), "--resume"),
            prepare=_on_hub,
            from_hub=True,
        ),
    ),
    "export": (2, _repeated("export")),
    "search": (3, _resumed("search")),
    "eval": (2, _resumed("eval")),
    "distill": (3, _resumed("distill", "--sparse-steps=2")),
    "push": (2, _repeated("push", on_hub=True, in_place="nothing")),
    "refresh": (2, _repeated("refresh", prepare=_old_code, in_place="converted")),
}


# Kinds of tries, as findings name them, each as often as it weighs.
KINDS = [f"kill_{name}" for name, (weight, _) in SCENARIOS.items() for _ in range(weight)]


def stop(shop: Workshop, kind: str, seed: int, number: int) -> Verdict:
    """Stop a verb, judge what is left, go on with it, compare with the undisturbed result."""
    chance = chance_of(seed, kind, number)
    name = kind.removeprefix("kill_")
    scenario = SCENARIOS[name][1]
    changes, requests, expected = _undisturbed(shop, name, scenario)
    shop.hub.empty()
    box = _box(shop, scenario)
    findings: list[str] = []
    told: list[str] = []
    argv, run = list(scenario.argv), None
    for _ in range(MOST_STOPS):
        before = rules.snapshot(box)
        fault, words_ = _fault(chance, changes, requests)
        shop.hub.kill_at = fault["request"] if fault["kind"] == "request" else 0
        told.append(words_)
        run = shop.run(box, argv, None if fault["kind"] == "request" else fault)
        shop.hub.kill_at = 0
        findings += _after_stop(box, scenario, run, fault["kind"], before, expected)
        argv = list(scenario.again)
        if run.code == 0 or chance.random() < 0.6:
            break
    before = rules.snapshot(box)
    # A run that was not stopped after all is done: an export is not repeated over itself.
    done = run is not None and run.code == 0 and scenario.again == scenario.argv
    last = run if done else shop.run(box, argv)
    if last.code != 0:
        findings.append(f"gone on with: exit code {last.code}: {last.err[-400:]}")
    else:
        findings += rules.touched(before, rules.snapshot(box), (scenario.output,), False)
        findings += differences(expected, _result(shop, box, scenario))
        findings += [f"{finding} after all" for finding in _strays(box, scenario)]
    findings += rules.message(last, ())
    shop.discard(box)
    shop.hub.empty()
    what = f"{name}: {', then '.join(told)}"
    return Verdict(kind, seed, number, what, argv, list(dict.fromkeys(findings)), last.code, last.wall)


def _box(shop: Workshop, scenario: Scenario) -> Path:
    box = shop.box(scenario.template, "stopped")
    # Nothing that is only read may be in the way of what is only written.
    shutil.rmtree(box / "outside", ignore_errors=True)
    if scenario.prepare is not None:
        scenario.prepare(shop, box)
    return box


def _undisturbed(shop: Workshop, name: str, scenario: Scenario) -> tuple[int, int, dict[str, str]]:
    """Changes of files, requests to the Hub, and the result of a run that nobody stops."""
    if f"stopped {name}" not in shop.known:
        shop.hub.empty()
        box = _box(shop, scenario)
        asked = len(shop.hub.requests)
        count = shop.folder / "changes"
        found = shop.run(box, list(scenario.argv), {"kind": "count", "file": str(count)})
        if found.code != 0:
            raise RuntimeError(f"{name} fails undisturbed: {found.err}")
        result = _result(shop, box, scenario)
        shop.known[f"stopped {name}"] = int(count.read_text()), len(shop.hub.requests) - asked, result
        shop.discard(box)
    return shop.known[f"stopped {name}"]


def _fault(chance: random.Random, changes: int, requests: int) -> tuple[dict, str]:
    if requests > 2 and (not changes or chance.random() < 0.5):
        at = chance.randrange(1, requests + 1)
        return {"kind": "request", "request": at}, f"killed at request {at} of {requests}"
    at = chance.randrange(1, max(2, changes + 1))
    where = f"at change {at} of {changes}"
    way = chance.choices(("kill", "interrupt", "full", "file_size", "error"), (12, 3, 2, 1, 2))[0]
    if way == "kill":
        torn = chance.choice([0, 0, chance.random()])
        return {"kind": "kill", "at": at, "torn": torn}, f"killed {where}" + (
            f", {torn:.0%} of it done" if torn else ""
        )
    if way == "interrupt":
        return {"kind": "interrupt", "at": at}, f"interrupted {where}"
    if way in ("full", "file_size"):
        # What is said on stderr is a file of the process, too.
        bytes_ = int(10 ** chance.uniform(2 if way == "full" else 4, 5.8))
        what = f"a disk with {bytes_:,} bytes" if way == "full" else f"no file beyond {bytes_:,} bytes"
        return {"kind": way, "bytes": bytes_}, what
    number = chance.choice([errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES])
    return {"kind": "error", "at": at, "errno": number}, f"{errno.errorcode[number]} {where}"


def _after_stop(
    box: Path, scenario: Scenario, run: Run, kind: str, before: dict[str, rules.Entry], expected: dict[str, str]
) -> list[str]:
    """What holds when a run has just been stopped."""
    killed = run.signal == 9
    findings = [] if killed else rules.ending(run, None) + rules.message(run, ())
    if killed and (run.late or run.greedy):
        findings += rules.ending(run, None)
    if kind == "interrupt" and run.code not in (0, 130):
        findings.append(f"Ctrl-C: exit code {run.code} in place of 130")
    # Ctrl-C may come just when a temporary folder is made or cleared.
    cut = killed or kind == "interrupt"
    findings += rules.touched(before, rules.snapshot(box), (scenario.output,), cut)
    if scenario.in_place is None and run.code != 0:
        left = box / scenario.output
        # A config that is there belongs to a finished checkpoint, whose temporary files may still be there.
        wrong = [finding for finding in differences(expected, contents(left)) if "too much" not in finding]
        done = (left / "config.json").exists() and not wrong
        if not done and f"{scenario.output}/config.json" not in before:
            findings += rules.left_behind(box, scenario.output, before, killed)
    return [f"stopped: {finding}" for finding in findings]


def _strays(box: Path, scenario: Scenario) -> list[str]:
    """Temporary files that outlive a finished run."""
    folder = box / scenario.output
    if not folder.is_dir():
        return []
    return [
        f"{name} is left"
        for name in rules.snapshot(folder)
        if name.endswith(rules.PARTIAL) or os.path.basename(name).startswith(".indexcache_")
    ]


def _result(shop: Workshop, box: Path, scenario: Scenario) -> dict[str, str]:
    if scenario.on_hub:
        import hashlib

        return {name: hashlib.sha256(data).hexdigest() for name, data in (shop.hub.files(PUSHED) or {}).items()}
    return contents(box / scenario.output)
