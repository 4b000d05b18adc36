"""As small_run.py, under FSDP2 as `accelerate launch --use_fsdp --fsdp_version 2` starts it, on CPUs.

accelerate reads the launcher's environment on accelerators alone; here processes of a CPU do as those of GPUs.
"""

import os
import sys

from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env


def launcher_environment():
    """What the launcher tells its processes."""
    flags = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1", "script.py"]
    names = "ACCELERATE_", "FSDP_"
    args = launch_command_parser().parse_args(flags)
    args.mixed_precision, args.dynamo_backend = "no", "no"
    return {name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith(names)}


def shard_on_cpus():
    """Let accelerate's state take FSDP for processes of a CPU."""
    initialise = AcceleratorState.__init__

    def initialised(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialised


if __name__ == "__main__":
    os.environ.update(launcher_environment())
    shard_on_cpus()
    from testing.small_run import main

    main(*sys.argv[1:])
