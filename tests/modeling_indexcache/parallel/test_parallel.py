"""Tensor and expert parallelism over two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from testing.time_limits import PROCESS_SECONDS
from testing.tiny_models import tiny_model


def run_on_two_processes(script, *arguments):
    """Run a script of this folder under torchrun; both processes must say that they agree."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*command, str(Path(__file__).with_name(script)), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout.count("agrees") == 2


@pytest.mark.parametrize("ep_size", [1, 2], ids=["tensor", "expert"])
def test_two_processes_generate_as_one(tmp_path, ep_size):
    tiny_model(index_share_pattern="FSFS").save_pretrained(tmp_path)
    run_on_two_processes("parallel_generation.py", tmp_path, ep_size)


@pytest.mark.parametrize("split", ["tensor", "expert", "data", "data, expert"])
def test_gradients_of_two_processes_are_those_of_one(tmp_path, split):
    tiny_model(index_share_pattern="FSFS").save_pretrained(tmp_path)
    run_on_two_processes("parallel_gradients.py", tmp_path, split)
