"""The journal of long work: every evaluation on disk before the next one begins, so that nothing is ever run twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

import torch

from .errors import EvaluationError


class Journal:
    """Scores by window set, pattern and round, in a file of JSON lines, or in memory only.

    The first line says what the work is; each other line is one evaluation. A line is on disk (fsync) before `add`
    returns; a half line that a crash left at the end is cut off.

    Args:
        path: the file; None keeps scores in memory.
        identity: JSON values that decide the scores (hashes of model and data, settings).
        resume: go on from an existing file.
        work: what messages call it.

    Raises:
        EvaluationError: the file exists and `resume` is false, is damaged, or belongs to other work.
    """

    def __init__(
        self, path: Path | None, identity: dict[str, Any], resume: bool = False, work: str = "search"
    ) -> None:
        self.path, self.identity, self.work = path, identity, work
        #: Evaluations taken from the file.
        self.resumed = 0
        self._records: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            if not resume:
                raise EvaluationError(f"{path} holds an earlier {work}: go on with --resume, or use --overwrite")
            self._read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        if not path.stat().st_size:
            self._write({"identity": identity})

    def get(self, windows: str, pattern: str, round_: int) -> torch.Tensor | None:
        """The scores of a round, fp64 `[windows of the round, 4]`, or None when it has not been run."""
        record = self._records.get((windows, pattern, round_))
        return None if record is None else torch.tensor(record["scores"], dtype=torch.float64)

    def add(self, windows: str, pattern: str, round_: int, scores: torch.Tensor, layer_forwards: int) -> None:
        """Record one round of one pattern, with the layer-forwards that it took."""
        record = {
            "windows": windows,
            "pattern": pattern,
            "round": round_,
            "scores": scores.tolist(),
            "layer_forwards": layer_forwards,
        }
        self._records[windows, pattern, round_] = record
        self._write(record)

    def layer_forwards(self, windows: str) -> int:
        """What all recorded evaluations on these windows took, those of interrupted runs included."""
        return sum(record["layer_forwards"] for key, record in self._records.items() if key[0] == windows)

    def count(self, windows: str) -> int:
        """How many evaluations on these windows are recorded."""
        return sum(key[0] == windows for key in self._records)

    def records(self) -> list[dict[str, Any]]:
        """All evaluations, for another process's journal in memory."""
        return list(self._records.values())

    def adopt(self, records: list[dict[str, Any]]) -> None:
        """Take over the evaluations that the first process read from its file."""
        for record in records:
            self._records[record["windows"], record["pattern"], record["round"]] = record

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, value: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(value) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            with path.open("r+b") as file:
                file.truncate(complete)
        lines = content[:complete].splitlines()
        try:
            records = [json.loads(line) for line in lines]
            identity = records[0]["identity"] if records else self.identity
            self.adopt(records[1:])
            self.resumed = len(self._records)
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path} is damaged ({error}): start again with --overwrite") from error
        differing = [key for key in {**identity, **self.identity} if identity.get(key) != self.identity.get(key)]
        if differing:
            # Of hashes the beginning is enough.
            shown = {key: [str(part.get(key))[:24] for part in (identity, self.identity)] for key in differing}
            changes = "; ".join(f"{key}: {there} there, {now} now" for key, (there, now) in shown.items())
            raise EvaluationError(
                f"{path} belongs to another {self.work} ({changes}): repeat its command, or give another --output, or "
                "start again with --overwrite"
            )
