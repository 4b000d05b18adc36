"""A whole model on the fused kernels, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from testing.time_limits import PROCESS_SECONDS

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux only")
def test_in_a_fresh_process():
    env = dict(os.environ, OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(HERE / "interpret_inference.py"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
