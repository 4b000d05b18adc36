"""FSDP2: gradients of sharded layers are those of a whole model, and a launched run those of one process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from testing.small_run import run, run_processes, write_source
from testing.time_limits import PROCESS_SECONDS

HERE = Path(__file__).parent


def test_gradients_of_a_sharded_model_are_those_of_a_whole_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "sharded_gradients.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "SHARDED GRADIENTS AGREE" in process.stdout


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["all weights", "adapters"])
def test_a_launched_run_killed_and_resumed_gives_the_weights_of_one_process(tmp_path, changes):
    write_source(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    changes = {"dtype": "float32", "accumulation": 1, **changes}
    run(tmp_path, one, **{**changes, "batch_size": 2})
    script = HERE / "fsdp_run.py"
    # 4 steps of the warm-up and 3 of the sparse stage, one of them behind its checkpoint.
    killed = run_processes(tmp_path, two, kill_at=7, count=2, check=False, script=script, **changes)
    assert killed.returncode != 0 and f"-{signal.SIGKILL.value}" in killed.stderr
    assert (two / "training/sparse/checkpoint-2").exists()
    run_processes(tmp_path, two, count=2, script=script, **changes)
    trained, expected = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=2e-5, msg=name)
