"""The callbacks of Trainer that say and write down how a distillation goes, and what they left behind."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..conversion.io.shard_writer import write_json
from ..runs.monitor import Monitor

# Marks a checkpoint that was written to its end.
COMPLETE_FILE = "distillation_checkpoint.json"
STAGE_LOG = "log.json"


class RecordKeeper(TrainerCallback):
    """Progress, the log as JSON after every entry, and a mark on every checkpoint that is whole.

    Args:
        stage: of the recipe.
        folder: the stage's folder.
        monitor: draws.
        done: steps that an earlier run has made.
    """

    def __init__(self, stage: str, folder: Path, monitor: Monitor, done: int) -> None:
        self.stage, self.folder, self.monitor, self.done = stage, folder, monitor, done

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`."""
        if state.is_world_process_zero:
            self.monitor.begin(f"{self.stage} stage", state.max_steps - self.done)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`."""
        if state.is_world_process_zero:
            self.monitor.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if not state.is_world_process_zero or "kl" not in (entry := state.log_history[-1]):
            return
        shown = [(name, entry[name]) for name in ("lm_loss", "kl", "recall") if name in entry]
        self.monitor.entry(", ".join(f"{name} {value:.4f}" for name, value in shown))
        write_json(self.folder / STAGE_LOG, state.log_history, durable=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if state.is_world_process_zero:
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            write_json(checkpoint / COMPLETE_FILE, {"stage": self.stage, "step": state.global_step})


def latest_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest whole checkpoint of a stage and its step; `(None, 0)` where there is none."""
    found = [(int(path.parent.name.rpartition("-")[2]), path.parent) for path in folder.glob(f"*/{COMPLETE_FILE}")]
    step, path = max(found, default=(0, None))
    return path, step


def tensorboard_callback(folder: Path, done: int) -> TrainerCallback | None:
    """Writes the log for TensorBoard, where that is installed; entries behind step `done` are dropped."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(folder, purge_step=done + 1))
