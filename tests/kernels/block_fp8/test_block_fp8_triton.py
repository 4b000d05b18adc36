"""The block fp8 kernels: numbers in Triton's interpreter and on a GPU, resources of the compiled code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from testing.time_limits import PROCESS_SECONDS

pytest.importorskip("triton")

WORKERS = Path(__file__).parent


def run(worker, **environment):
    # The interpreter is chosen when triton is imported, and compiling must not inherit that choice.
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{WORKERS / worker}.py"]
    done = subprocess.run(command, env=env | environment, capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux only")
def test_numbers_in_the_interpreter():
    run("interpret_block_fp8", TRITON_INTERPRET="1")


@pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux only")
def test_compiled_for_every_architecture():
    run("compile_block_fp8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_numbers_on_a_gpu():
    run("interpret_block_fp8")
