"""The journal of long work: every evaluation on disk before the next one begins, so that nothing is ever run twice."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

import torch

from .errors import RunError

# A damaged journal is kept beside the repaired one under this suffix.
DAMAGED_SUFFIX = ".damaged"
_NUMBER, _CHECK = "line", "check"


class Journal:
    """What long work has found so far, in a file of JSON lines, or in memory only; the base of those that read it.

    The first line says what the work is; each other line is one result. Every line carries its number and a
    checksum, so that a line that was changed or taken out is noticed: its result is found again, and `damage` says
    so. A line is on disk (fsync) before `add` returns; a half line that a crash left at the end is cut off. One
    process at a time may hold the file.

    Args:
        path: the file; None keeps scores in memory.
        identity: JSON values that decide the scores (hashes of model and data, settings).
        resume: go on from an existing file.
        work: what messages call it.
        overwrite: forget what the file holds.

    Raises:
        RunError: the file exists and `resume` is false, its first line is damaged, it belongs to other work,
            or another process is writing it.
    """

    def __init__(
        self,
        path: Path | None,
        identity: dict[str, Any],
        resume: bool = False,
        work: str = "search",
        overwrite: bool = False,
    ) -> None:
        self.path, self.identity, self.work = path, identity, work
        #: Evaluations taken from the file.
        self.resumed = 0
        #: What was wrong with the file, in a sentence; None where it is whole.
        self.damage: str | None = None
        self._lines = 0
        self._file: TextIO | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_alone(path, work)
        try:
            if overwrite:
                self._file.truncate(0)
            if path.stat().st_size:
                if not resume:
                    raise RunError(f"{path} holds an earlier {work}: go on with --resume, or use --overwrite")
                self._read(path)
            else:
                self._write({"identity": identity})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, record: dict[str, Any]) -> None:
        """Take over one record of the file; ValueError, KeyError, TypeError or RuntimeError when it is none."""
        raise NotImplementedError

    # ---- the file -----------------------------------------------------------------------------------------------

    def _write(self, value: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(_line(value, self._lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            # The system names no file: an open one may have any name.
            raise OSError(error.errno, f"{error.strerror}; --resume goes on from there", self._file.name) from error
        self._lines += 1

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.truncate(path, complete)
        lines = content[:complete].split(b"\n")[:-1]
        if not lines:  # stopped within the first line
            self._write({"identity": self.identity})
            return
        identity = _checked(lines[0], 0)
        if identity is None or not isinstance(identity.get("identity"), dict):
            raise RunError(
                f"{path} is damaged in its first line, which says what it belongs to, or an older release wrote it: "
                "start again with --overwrite"
            )
        self._compare(path, identity["identity"])
        sound: dict[int, dict[str, Any]] = {}
        for line in lines[1:]:
            record = _checked(line)
            number = None if record is None else record.pop(_NUMBER)
            try:
                if record is not None and number is not None:
                    self._take(record)
                    sound[number] = record
            except (ValueError, KeyError, TypeError, RuntimeError):
                continue
        self.resumed, self._lines = len(sound), len(lines)
        expected = range(1, max([len(lines) - 1, *sound]) + 1)
        if broken := [number for number in expected if number not in sound]:
            self._repair(path, content, list(sound.values()), len(expected), broken[0])

    def _compare(self, path: Path, identity: dict[str, Any]) -> None:
        """RunError where the file belongs to other work."""
        differing = [key for key in {**identity, **self.identity} if identity.get(key) != self.identity.get(key)]
        if not differing:
            return
        # Of hashes the beginning is enough.
        shown = {key: [str(part.get(key))[:24] for part in (identity, self.identity)] for key in differing}
        changes = "; ".join(f"{key}: {there} there, {now} now" for key, (there, now) in shown.items())
        raise RunError(
            f"{path} belongs to another {self.work} ({changes}): repeat its command, or give another --output, or "
            "start again with --overwrite"
        )

    def _repair(self, path: Path, content: bytes, sound: list[dict[str, Any]], expected: int, first: int) -> None:
        """Write the file anew from its sound lines, numbered through; what it was stays beside it."""
        damaged = path.with_name(path.name + DAMAGED_SUFFIX)
        damaged.write_bytes(content)
        lines = [{"identity": self.identity}, *sound]
        with path.open("r+", encoding="utf-8") as file:
            # In place: the file is held under its name.
            file.write("".join(_line(value, number) for number, value in enumerate(lines)))
            file.truncate()
            os.fsync(file.fileno())
        self._lines = len(lines)
        self.damage = (
            f"{path}: {expected - len(sound)} of {expected} evaluations are damaged or missing (the first is that of "
            f"line {first + 1}) and are run again where they are needed, so that what the work took may be counted "
            f"differently; the file as it was is {damaged}"
        )


class ScoreJournal(Journal):
    """Scores by window set, pattern and round: the journal of a search and of an evaluation. Arguments: `Journal`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._records: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._used: set[tuple[str, str, int]] = set()
        super().__init__(*arguments, **options)

    def get(self, windows: str, pattern: str, round_: int) -> torch.Tensor | None:
        """The scores of a round, fp64 `[windows of the round, 4]`, or None when it has not been run."""
        record = self._records.get((windows, pattern, round_))
        if record is None:
            return None
        self._used.add((windows, pattern, round_))
        return torch.tensor(record["scores"], dtype=torch.float64)

    def peek(self, windows: str, pattern: str, round_: int) -> torch.Tensor | None:
        """As `get`, without its being a use."""
        record = self._records.get((windows, pattern, round_))
        return None if record is None else torch.tensor(record["scores"], dtype=torch.float64)

    def was_used(self, windows: str, pattern: str, round_: int) -> bool:
        """Whether this round was asked for or added since the work was begun or gone on with."""
        return (windows, pattern, round_) in self._used

    def add(self, windows: str, pattern: str, round_: int, scores: torch.Tensor, layer_forwards: int) -> None:
        """Record one round of one pattern, with the layer-forwards that it took."""
        record = {
            "windows": windows,
            "pattern": pattern,
            "round": round_,
            "scores": scores.tolist(),
            "layer_forwards": layer_forwards,
        }
        self._take(record)
        self._used.add((windows, pattern, round_))
        self._write(record)

    def layer_forwards(self, windows: str) -> int:
        """What the evaluations on these windows took that were used so far, those of interrupted runs included."""
        return sum(self._records[key]["layer_forwards"] for key in self._used if key[0] == windows)

    def count(self, windows: str) -> int:
        """How many evaluations on these windows were used so far."""
        return sum(key[0] == windows for key in self._used)

    def records(self) -> list[dict[str, Any]]:
        """All evaluations, for another process's journal in memory."""
        return list(self._records.values())

    def adopt(self, records: list[dict[str, Any]]) -> None:
        """Take over the evaluations that the first process read from its file."""
        for record in records:
            self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        """See `Journal`."""
        key = record["windows"], record["pattern"], record["round"]
        if [type(part) for part in key] != [str, str, int] or type(record["layer_forwards"]) is not int:
            raise TypeError("a record's windows and pattern are texts, its round and layer_forwards numbers")
        torch.tensor(record["scores"], dtype=torch.float64)
        self._records[key] = record


def _line(value: dict[str, Any], number: int) -> str:
    numbered = {**value, _NUMBER: number}
    return json.dumps({**numbered, _CHECK: _checksum(numbered)}) + "\n"


def _checksum(numbered: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(numbered).encode()).hexdigest()[:16]


def _checked(line: bytes, number: int | None = None) -> dict[str, Any] | None:
    """A line's value with its number, or None where it is not what was written."""
    try:
        value = json.loads(line)
        check = value.pop(_CHECK)
        sound = check == _checksum(value) and type(value[_NUMBER]) is int and number in (None, value[_NUMBER])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return value if sound else None


def _open_alone(path: Path, work: str) -> TextIO:
    """The file, opened to append, held so that no other process opens it so; RunError where one has."""
    file = path.open("a", encoding="utf-8")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RunError(
            f"{path} is being written by another process: wait until its {work} ends, or give another --output"
        ) from error
    except (ImportError, OSError):
        # Not every system and file system has locks.
        pass
    return file
