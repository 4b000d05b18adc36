"""Tensor and expert parallelism over two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from time_limits import PROCESS_SECONDS
from tiny_models import tiny_model


@pytest.mark.parametrize("ep_size", [1, 2], ids=["tensor", "expert"])
def test_two_processes_equal_one(tmp_path, ep_size):
    tiny_model(index_share_pattern="FSFS").save_pretrained(tmp_path)
    script = Path(__file__).with_name("parallel_generation.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*command, str(script), str(tmp_path), str(ep_size)],
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout.count("agrees") == 2
