"""Where long work reads and writes: what a search and a distillation have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .windows.window_sources import Sampling


@dataclass(frozen=True)
class RunOptions:
    """Where long work reads and writes.

    Attributes:
        data: what decides or trains; see `windows/window_sources.py`.
        output: folder for the results and the journal.
        held_out: data for checks; without it they are split off from `data`, or left out.
        sampling: how windows are taken.
        resume: go on from the journal in `output`.
        overwrite: forget what an earlier run wrote there.
    """

    data: str
    output: Path
    held_out: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    resume: bool = False
    overwrite: bool = False
