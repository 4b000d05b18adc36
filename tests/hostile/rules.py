"""What every try is judged by: how it ended, what it said, what it touched, what it left, what it calls done."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from workshop import HUB_TOKEN, SECRET, Run

CODES = (0, 1, 2, 130)
LONGEST_MESSAGE = 6_000
# Files that a stopped run may leave in its output, to go on from or to start again from.
WORKING_FILES = re.compile(
    r"(^|/)(\.indexcache_[a-z_]+(\.json)?|journal\.jsonl|runs|training)(/|$)|\.lock$|(^|/)\.indexcache_download/"
)
PARTIAL = ".partial"
# Clears the screen: what names and values of the tries carry to see whether a message passes it on.
ESCAPE = "\x1b[2J"


@dataclass(frozen=True)
class Entry:
    """One name in a sandbox."""

    kind: str
    mode: int
    size: int
    mtime: int
    content: str


def snapshot(folder: Path) -> dict[str, Entry]:
    """Every name below a folder, with what it holds; never follows a link, never opens what is no plain file."""
    found: dict[str, Entry] = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(root, name)
            status = os.lstat(path)
            kind, content = "other", ""
            if stat.S_ISLNK(status.st_mode):
                kind, content = "link", os.readlink(path)
            elif stat.S_ISDIR(status.st_mode):
                kind = "folder"
            elif stat.S_ISREG(status.st_mode):
                kind, content = "file", hashlib.sha256(_bytes(path)).hexdigest()
            plain = kind in ("file", "link")
            found[os.path.relpath(path, folder)] = Entry(
                kind,
                stat.S_IMODE(status.st_mode),
                status.st_size if plain else 0,
                status.st_mtime_ns if plain else 0,
                content,
            )
    return found


def ending(run: Run, must_fail: bool | None) -> list[str]:
    """It ends by itself, in bounded time and memory, with a code that means something."""
    if run.late:
        return [f"it hangs (stopped after {run.wall:.0f} s, {run.cpu:.0f} s of them busy)"]
    if run.greedy:
        return [f"it takes more than {run.memory / 2**20:,.0f} MiB"]
    if run.signal is not None:
        return [f"it dies of signal {run.signal}"]
    found = []
    if run.code not in CODES:
        found.append(f"exit code {run.code}")
    if must_fail is True and run.code == 0:
        found.append("exit code 0 where it must fail")
    if must_fail is False and run.code != 0:
        found.append(f"exit code {run.code} where it must succeed: {_first_error(run)}")
    return found


def message(run: Run, names: tuple[str, ...]) -> list[str]:
    """No traceback; a failure says one thing, clearly, and names the file or the value."""
    both = run.out + run.err
    if "Traceback (most recent call last)" in both:
        lines = [line for line in both.splitlines() if line and not line[0].isspace()]
        return [f"a traceback: {lines[-1][:300]}"]
    found = []
    if HUB_TOKEN in both:
        found.append("the Hub token is printed")
    if SECRET in both:
        found.append("what lies outside the checkpoint is printed")
    if ESCAPE in both:
        found.append("an escape sequence of the input reaches the terminal")
    if run.code in (0, None) or run.late or run.greedy:
        return found
    said = run.err
    if run.code == 1 and not said and run.out:  # a check that failed: verify
        return found
    errors = len(re.findall(r"^error: ", said, re.MULTILINE)) + len(re.findall(r"^╭─ Error ─", said, re.MULTILINE))
    if errors != 1:
        found.append(f"{errors} error messages in place of one: {said[-300:]!r}")
        return found
    if len(said) > LONGEST_MESSAGE:
        found.append(f"an error message of {len(said):,} characters")
    flat = re.sub(r"[\s│]+", "", said)
    if names and not any(re.sub(r"\s+", "", name) in flat for name in names if name):
        found.append(f"the error names neither file nor value ({', '.join(names)[:200]}): {_first_error(run)}")
    return found


def touched(before: dict[str, Entry], after: dict[str, Entry], writable: tuple[str, ...], killed: bool) -> list[str]:
    """Nothing outside the output changes; temporary files are gone unless the process was killed."""
    may = (*writable, "tmp") if killed else writable
    found = []
    for name in sorted(before.keys() | after.keys()):
        if any(name == place or name.startswith(place + "/") for place in may) or name == "tmp":
            continue
        old, new = before.get(name), after.get(name)
        if old != new:
            change = "is new" if old is None else "is gone" if new is None else "is changed"
            found.append(f"outside the output, {name} {change}")
    return found


def left_behind(box: Path, output: str, before: dict[str, Entry], killed: bool) -> list[str]:
    """After a failure: no half file under its final name, and nothing new that would load as a checkpoint.

    Args:
        box: the sandbox.
        output: the output folder in it.
        before: the sandbox as it was.
        killed: then temporary files may lie about.
    """
    folder, found = box / output, []
    if not folder.is_dir() or folder.is_symlink():
        return []
    now = snapshot(folder)
    for name, entry in sorted(now.items()):
        if entry == before.get(f"{output}/{name}") or entry.kind != "file" or WORKING_FILES.search(name):
            continue
        if name.endswith(PARTIAL):
            if not killed:
                found.append(f"{name} is left behind")
            continue
        data = _bytes(folder / name)
        if name == "config.json":
            found.append("the output of a failed run has a config.json")
        elif (name.endswith(".safetensors") and not _whole_shard(data)) or (
            name.endswith(".json") and not _is_json(data)
        ):
            found.append(f"{name} is half written")
    return found


def kept_in(box: Path, outputs: tuple[str, ...]) -> list[str]:
    """Neither the token nor what lies outside the checkpoint is in any file that was written."""
    found = []
    for output in outputs:
        for path in sorted((box / output).rglob("*")) if (box / output).is_dir() else [box / output]:
            if path.is_symlink() or not path.is_file():
                continue
            data = _bytes(path)
            for what, secret in (("the Hub token", HUB_TOKEN), ("what lies outside the checkpoint", SECRET)):
                if secret.encode() in data:
                    found.append(f"{path.name} in the output holds {what}")
    return found


def strict_json(text: str) -> object:
    """JSON without NaN and Infinity, which are none."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _whole_shard(data: bytes) -> bool:
    if len(data) < 8:
        return False
    length = int.from_bytes(data[:8], "little")
    try:
        header = strict_json(data[8 : 8 + length].decode())
    except ValueError:
        return False
    if not isinstance(header, dict):
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return len(data) == 8 + length + max(ends, default=0)


def _is_json(data: bytes) -> bool:
    try:
        strict_json(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _bytes(path: str | Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read()


def _first_error(run: Run) -> str:
    lines = [line for line in run.err.splitlines() if "error" in line.lower()] or run.err.splitlines()[-1:]
    return (lines[0] if lines else "nothing on stderr")[:300]
