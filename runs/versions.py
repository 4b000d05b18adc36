"""What a result was made with: versions, machine, date and commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from ..conversion.convert.installed_versions import installed_versions

ROOT = Path(__file__).resolve().parents[1]
# Names the commit where the measured copy is not a checkout.
COMMIT_VARIABLE = "INDEXCACHE_COMMIT"


def stamp() -> dict[str, str | int | None]:
    """Versions, device, threads, date and commit, for every result file; None for what is not there or not known."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **installed_versions("indexcache", "triton", "transformers"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
    }


def commit(root: Path = ROOT) -> str | None:
    """The commit of the package in `root`, "with changes" behind it if files differ from it.

    `INDEXCACHE_COMMIT` goes before git. None outside a checkout of the package itself: a repository that merely
    contains an installed copy says nothing about it.
    """
    named = os.environ.get(COMMIT_VARIABLE)
    if named:
        return named
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} with changes" if changed else head


def _git(root: Path, *arguments: str) -> str:
    finished = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return finished.stdout.strip()
