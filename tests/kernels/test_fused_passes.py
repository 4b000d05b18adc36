"""Norms, RoPE, routing and experts in Triton: numbers in Triton's interpreter, resources of the compiled code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

WORKERS = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux only")
@pytest.mark.parametrize("worker", ["interpret_fused_passes", "compile_fused_passes"])
def test_in_a_fresh_process(worker):
    # The interpreter is chosen when triton is imported, and compiling must not inherit that choice.
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env.pop("TRITON_INTERPRET", None)
    if worker.startswith("interpret"):
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{WORKERS / worker}.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
