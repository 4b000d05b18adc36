"""The folder that long work writes to, looked at before the work begins."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..conversion.io.sources import pipes_in
from .errors import RunError


def prepare_output(folder: Path, journal: Path, resume: bool, overwrite: bool, work: str) -> None:
    """Make a folder for results ready, so that the work does not end at it.

    Args:
        folder: made where it is absent.
        journal: of the work, in the folder.
        resume: go on from it.
        overwrite: forget it.
        work: what messages call it.

    Raises:
        RunError: it is no folder, cannot be written to, or holds pipes, devices or earlier work.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output {folder} is a file, and a folder is written: give another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        pipes = pipes_in(folder, below=False)
    except OSError as error:
        raise RunError(f"--output {folder} cannot be written to: {error.strerror or error}") from error
    if pipes:
        # Journal, results, pictures and report are opened under their names, which may wait for ever.
        raise RunError(
            f"--output {folder} holds pipes or devices where files belong ({', '.join(pipes[:5])}): remove them, or "
            "give another folder"
        )
    if journal.is_dir():
        raise RunError(f"{journal} is a folder, and the journal belongs there: give another --output")
    if journal.exists() and journal.stat().st_size and not (resume or overwrite):
        raise RunError(f"{journal} holds an earlier {work}: go on with --resume, or use --overwrite")
