"""Two processes find what one finds, bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from testing.time_limits import PROCESS_SECONDS

from indexcache.runs.processes import Processes

SCRIPT = Path(__file__).with_name("two_processes.py")


def run(tmp_path, count, algorithm):
    output = tmp_path / f"{count}.json"
    launch = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # With what the environment names, so that the same copy of the package is tested.
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]),
    }
    finished = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), str(output), algorithm],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(output.read_text()), output.with_suffix(".jsonl").read_text().splitlines()


@pytest.mark.parametrize("algorithm", ["lazy", "greedy"])
def test_two_processes_give_the_result_of_one(tmp_path, algorithm):
    (alone, journal), (together, shared) = (run(tmp_path, count, algorithm) for count in (1, 2))
    assert together == alone, "patterns, scores and layer-forwards"
    assert [json.loads(line) for line in shared] == [json.loads(line) for line in journal]


def test_batches_are_split_without_gaps():
    parts = [Processes(rank, 3).mine(range(4, 12)) for rank in range(3)]
    assert sorted(batch for part in parts for batch in part) == list(range(4, 12))
    assert Processes(1, 3, "tensor").mine(range(4, 12)) == list(range(4, 12)), "a sharded model runs them all"


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = Processes.from_environment()
    table = torch.rand(2, 2)
    assert processes.count == 1 and processes.gather(table) is table and processes.share("value") == "value"
