"""Kernel tests in a process of their own: Triton's interpreter is chosen when triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

from testing.time_limits import PROCESS_SECONDS


def run_worker(folder, worker):
    """Run a folder's tests of `interpret_*.py` with TRITON_INTERPRET=1, those of `compile_*.py` without it."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env.pop("TRITON_INTERPRET", None)
    if worker.startswith("interpret"):
        env["TRITON_INTERPRET"] = "1"
    path = Path(folder) / f"{worker}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--show-capture=no", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
