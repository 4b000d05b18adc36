"""Where a distillation reads, writes and runs."""

from __future__ import annotations

from dataclasses import dataclass

from ..runs.run_options import RunOptions


@dataclass(frozen=True)
class DistillationRun(RunOptions):
    """Beside `RunOptions`; of `sampling`, `nsamples` and `seed` are of the held-out windows.

    Attributes:
        dtype: of the weights written; `auto` is the source's own.
        device: `cpu` keeps away from the GPU.
        tensorboard: write `runs/` where TensorBoard is installed.
        keep_checkpoints: leave `training/` in place at the end.
        repo_id: the Hub id that the card names.
    """

    dtype: str = "auto"
    device: str | None = None
    tensorboard: bool = True
    keep_checkpoints: bool = False
    repo_id: str | None = None
