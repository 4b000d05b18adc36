"""FSDP2: divergences cross the borders of sharded layers, and gradients come out as in a whole model."""

import os
import subprocess
import sys
from pathlib import Path

from time_limits import PROCESS_SECONDS

HERE = Path(__file__).parent


def test_gradients_of_a_sharded_model_are_those_of_a_whole_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "sharded_gradients.py"), str(HERE.parent / "modeling_indexcache")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "SHARDED GRADIENTS AGREE" in process.stdout
