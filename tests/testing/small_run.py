"""A distillation of a few seconds: a tiny checkpoint, windows, a recipe; also as a process of its own.

As a script: `small_run.py FOLDER OUTPUT KILL_AT [RECIPE AS JSON]` runs with --resume and kills itself at that step.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from testing.time_limits import PROCESS_SECONDS

from indexcache.distillation.recipe import Recipe
from indexcache.distillation.run import run_distillation
from indexcache.distillation.run_options import DistillationRun
from indexcache.distillation.source import open_distillation_source
from indexcache.runs.monitor import Monitor
from indexcache.runs.windows.window_sources import Sampling

RECIPE = dict(
    dense_steps=4,
    sparse_steps=6,
    dense_learning_rate=1e-2,
    learning_rate=1e-3,
    batch_size=1,
    accumulation=2,
    log_every=1,
    save_every=2,
    precision="fp32",
    recall_queries=8,
)


def write_source(folder, **changes):
    from testing.tiny_models import tiny_model

    tiny_model(index_share_pattern="FFFF", **changes).save_pretrained(folder / "source")
    generator = torch.Generator().manual_seed(1)
    for name, count in (("train", 30), ("held", 2)):
        ids = torch.randint(0, 97, (count, 41), generator=generator)
        save_file({f"{name}_ids": ids, f"{name}_recall": (ids > 80).to(torch.uint8)}, folder / f"{name}.safetensors")


def run(folder, output, monitor=None, pattern="FSFS", device="cpu", **changes):
    options = {
        name: changes.pop(name) for name in ("resume", "overwrite", "dtype", "keep_checkpoints") if name in changes
    }
    source = open_distillation_source(str(folder / "source"), pattern=pattern)
    run_options = DistillationRun(
        str(folder / "train.safetensors"),
        output,
        str(folder / "held.safetensors"),
        Sampling(),
        device=device,
        tensorboard=False,
        **options,
    )
    return run_distillation(source, Recipe(**{**RECIPE, **changes}), run_options, monitor or Monitor())


def run_processes(folder, output, kill_at=0, count=1, check=True, script=__file__, launcher=(), **changes):
    """The same in processes of their own; returns the finished process."""
    if count > 1:
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", str(count), "--standalone")
    command = [sys.executable, *launcher]
    command += [str(script), str(folder), str(output), str(kill_at), json.dumps(changes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROCESS_SECONDS)
    if check:
        assert process.returncode == 0, process.stdout + process.stderr
    return process


class Killer(Monitor):
    """Kills the process at a step."""

    def __init__(self, at):
        self.left = at

    def step(self, text=""):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, output, kill_at, changes):
    run(Path(folder), Path(output), Killer(int(kill_at)), resume=True, **json.loads(changes))


if __name__ == "__main__":
    main(*sys.argv[1:])
