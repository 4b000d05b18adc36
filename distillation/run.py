"""Run a distillation from a checkpoint's name to a finished IndexCache checkpoint: what `indexcache distill` calls.

The output folder holds a journal and `training/` (checkpoints of both stages) until everything is written; killed
anywhere, the same command with `--resume` goes on from the last whole checkpoint, and ends as an undisturbed run.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging as transformers_logging

from ..conversion.convert.journal import RECIPE_FILE, Journal, check_apart, output_state, take_output
from ..conversion.io.shard_writer import write_json
from ..conversion.io.sources import ConversionError, FolderSource
from ..evaluation.perplexity import evaluate_windows, largest_weight
from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ..runs.errors import RunError
from ..runs.monitor import Monitor
from ..runs.processes import Processes
from ..runs.windows.calibration import short_window_warning
from ..runs.windows.tokenizer import load_tokenizer
from ..runs.windows.windows import Windows
from .data import TrainingWindows, load_training_data
from .errors import DistillationDiverged, disk_errors
from .monitor import RecordKeeper, latest_checkpoint, tensorboard_callback
from .output import TRAINING_FOLDER, recipe_document, source_fingerprints, write_checkpoint
from .recipe import DENSE, SPARSE, Recipe
from .run_options import DistillationRun
from .source import DistillationSource, load_with_new_indexers
from .training.adapters import ADAPTERS_FILE, add_adapters, load_adapters, merge_adapters, require_peft
from .training.all_experts import use_all_experts
from .training.autocast_experts import use_autocast_experts
from .training.graphed_step import refuse_where_no_graphs_run
from .training.sharded_training import gather_whole_states
from .training.trainer import DistillationTrainer, freeze_for, training_arguments

BEFORE_FILE, TENSORBOARD_FOLDER = "before.json", "runs"
# In a folder of checkpoints that a finished run is about to remove.
_DONE_WITH = ".done_with"


@dataclass(frozen=True)
class _Work:
    """What every part of a distillation reads.

    Attributes:
        source: what is trained.
        recipe: how.
        run: where it reads and writes.
        windows: to train on.
        held_out: to score on, or None.
        monitor: shows progress; a silent one in all processes but the first.
        processes: who shares the work.
    """

    source: DistillationSource
    recipe: Recipe
    run: DistillationRun
    windows: TrainingWindows
    held_out: Windows | None
    monitor: Monitor
    processes: Processes

    @property
    def training(self) -> Path:
        """The folder of the stages' checkpoints."""
        return self.run.output / TRAINING_FOLDER

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the CPU."""
        return self.run.device == "cpu" or not torch.cuda.is_available()


def run_distillation(
    source: DistillationSource, recipe: Recipe, run: DistillationRun, monitor: Monitor
) -> dict[str, Any]:
    """Train, write the checkpoint, and return what it scored and how it was made.

    Raises:
        RunError: data, settings or state that cannot be used; a loss that diverges; too little memory.
        ConversionError: an output folder that is taken.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise RunError("training needs accelerate: pip install 'indexcache[train]'")
    if recipe.lora_rank is not None:
        require_peft()
    processes = Processes.from_environment()
    quiet = monitor if processes.is_first else Monitor()
    if source.is_dense and not recipe.dense_steps:
        raise RunError("a dense source needs the warm-up, its indexers know nothing yet: give --dense-steps")
    refuse_where_no_graphs_run(recipe, run.device == "cpu", processes.count)
    if isinstance(source.opened, FolderSource):
        check_apart(source.opened.folder, run.output)
    tokenizer = load_tokenizer(source.opened)
    quiet.note(f"reading {run.data}")
    windows, held_out = load_training_data(
        run.data, run.held_out, source.config, tokenizer, recipe, run.sampling, processes.count
    )
    warning = short_window_warning(windows.seqlen, source.config.index_topk)
    if warning:
        quiet.warn(warning)
    document = recipe_document(source, recipe, windows, held_out, processes.count, run.dtype)
    journal = Journal(run.output, {**document, "repo_id": run.repo_id, "source files": source_fingerprints(source)})
    if processes.share(processes.is_first and _begin(run, journal, document)):
        return _read_object(run.output / RECIPE_FILE)
    work = _Work(source, recipe, run, windows, held_out, quiet, processes)
    _say_start(work)
    transformers_logging.disable_progress_bar()
    with quiet, disk_errors(run.output):
        scores = {} if held_out is None else _before(work)
        found: Path | None = None
        for stage in recipe.stages:
            found = _train_stage(stage, work, found)
        if processes.is_first:
            assert found is not None
            logs = {stage: _log(latest_checkpoint(work.training / stage)[0]) for stage in recipe.stages}

            def score(model: IndexCacheForCausalLM) -> None:
                if held_out is not None:
                    scores["after"] = _scores(model, work)

            quiet.note("writing the checkpoint")
            write_checkpoint(_merged(work, found), source, run, document, scores, logs, score)
            if not run.keep_checkpoints:
                (work.training / _DONE_WITH).touch()
            journal.remove()
            _remove_checkpoints(work.training)
    processes.wait()
    return _read_object(run.output / RECIPE_FILE)


def _remove_checkpoints(training: Path) -> None:
    """Remove checkpoints that are marked as done with, the mark last: after a kill the next run goes on."""
    if (training / _DONE_WITH).exists():
        for path in training.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _DONE_WITH:
                path.unlink(missing_ok=True)
        (training / _DONE_WITH).unlink()
    with suppress(OSError):  # one that is not empty
        training.rmdir()


def _begin(run: DistillationRun, journal: Journal, document: dict[str, Any]) -> bool:
    """Make the output ready; True when a finished run is what this one would write."""
    state = output_state(run.output)
    if state == "finished" and run.resume and not run.overwrite:
        found = _read_object(run.output / RECIPE_FILE)
        if any(found.get(key) != value for key, value in document.items()):
            raise ConversionError(
                f"{run.output} holds another finished checkpoint: give another output, or --overwrite"
            )
        _remove_checkpoints(run.output / TRAINING_FOLDER)
        return True
    take_output(
        run.output,
        journal,
        [RECIPE_FILE],
        resume=run.resume,
        overwrite=run.overwrite,
        work="distillation",
        folders=(TRAINING_FOLDER, TENSORBOARD_FOLDER),
    )
    run.output.mkdir(parents=True, exist_ok=True)
    journal.write()
    return False


def _say_start(work: _Work) -> None:
    recipe, windows = work.recipe, work.windows
    step = recipe.batch_size * recipe.accumulation * work.processes.count
    stages = " + ".join(f"{recipe.steps(stage):,} {stage}" for stage in recipe.stages)
    needed = step * (recipe.dense_steps + recipe.sparse_steps)
    passes = f", {needed / len(windows):.1f} passes" if needed > len(windows) else ""
    work.monitor.note(
        f"{work.source.location}: pattern {work.source.pattern}; {stages} steps of {step * windows.seqlen:,} tokens "
        f"from {len(windows):,} windows of {windows.seqlen:,}{passes}"
    )


# ---- stages -------------------------------------------------------------------------------------------------------


def _train_stage(stage: str, work: _Work, earlier: Path | None) -> Path:
    """Train one stage to its last step, after that which ended with `earlier`; the checkpoint it ends with."""
    recipe, run, monitor, processes = work.recipe, work.run, work.monitor, work.processes
    folder = work.training / stage
    checkpoint, done = processes.share(latest_checkpoint(folder))
    if checkpoint is not None and done >= recipe.steps(stage):
        monitor.note(f"{stage} stage: done before")
        return checkpoint
    if checkpoint is not None:
        monitor.note(f"{stage} stage: going on from step {done}")
    set_seed(recipe.seed)
    model, new = _load(work, checkpoint, earlier)
    if new:
        layers = f"layers {', '.join(map(str, new))}"
        monitor.note(f"{layers} get new indexers")
        if stage == SPARSE:
            raise RunError(
                f"{layers} have no indexers yet, and without a warm-up they would select at random: give --dense-steps"
            )
    if stage == SPARSE and recipe.lora_rank is not None and checkpoint is None:
        add_adapters(model, recipe.lora_rank)
    if recipe.cuda_graph:
        # Routing weights in fp32 looks at how many tokens go to each expert, which a graph cannot.
        use_all_experts(model)
    elif recipe.precision == "bf16":
        use_autocast_experts(model)
    freeze_for(stage, model, adapters_only=recipe.lora_rank is not None)
    callbacks: list[Any] = [RecordKeeper(stage, folder, monitor, done)]
    if run.tensorboard and processes.is_first:
        callbacks += filter(None, [tensorboard_callback(run.output / TENSORBOARD_FOLDER / stage, done)])
    folder.mkdir(parents=True, exist_ok=True)
    arguments = training_arguments(stage, recipe, folder, use_cpu=work.on_cpu)
    trainer = DistillationTrainer(model, stage, recipe, arguments, work.windows, callbacks=callbacks)
    if trainer.is_fsdp_enabled:
        gather_whole_states(trainer.accelerator.state.fsdp_plugin)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except DistillationDiverged as error:
        about = f"{work.source.location} on {run.data}: {error}"
        if trainer.state.global_step == 0 and error.weights_are_sound:
            about += f". At the first step it may be the checkpoint: {largest_weight(model)}"
        raise DistillationDiverged(f"{about}. {_what_is_left(error, trainer, folder)}") from None
    except torch.OutOfMemoryError as error:
        raise RunError(_out_of_memory(work, stage)) from error
    checkpoint, done = processes.share(latest_checkpoint(folder))
    if checkpoint is None or done < recipe.steps(stage):
        raise RunError(f"the {stage} stage ended at step {done} of {recipe.steps(stage)}: run with --resume")
    trainer.accelerator.free_memory()
    return Path(checkpoint)


def _what_is_left(error: DistillationDiverged, trainer: DistillationTrainer, folder: Path) -> str:
    """Save the model that a stopped stage had, where it is sound; a sentence that says where to look."""
    if error.weights_are_sound:
        stopped = folder / f"stopped-at-{trainer.state.global_step}"
        trainer.save_model(str(stopped), _internal_call=True)
        return f"The model before that step is {stopped}, a checkpoint like any other; earlier ones stand beside it"
    checkpoint, _ = latest_checkpoint(folder)
    return f"The last checkpoint before it is {checkpoint}" if checkpoint else "There is no checkpoint before it"


def _load(work: _Work, checkpoint: Path | None, earlier: Path | None) -> tuple[IndexCacheForCausalLM, list[int]]:
    """The fp32 model of a checkpoint, or of what the stage begins with; and the layers with new indexers."""
    if checkpoint is not None and not (checkpoint / ADAPTERS_FILE).exists():
        return load_with_new_indexers(checkpoint, dtype=torch.float32)
    if earlier is None:
        model, new = work.source.load(torch.float32)
    else:
        model, new = load_with_new_indexers(earlier, dtype=torch.float32)
    if checkpoint is not None:
        assert work.recipe.lora_rank is not None
        add_adapters(model, work.recipe.lora_rank)
        load_adapters(model, checkpoint)
    return model, new


def _merged(work: _Work, checkpoint: Path) -> Path:
    """The last stage's checkpoint as a whole model: adapters are merged into the weights that they adapt."""
    if not (checkpoint / ADAPTERS_FILE).exists():
        return checkpoint
    work.monitor.note("merging the adapters")
    earlier = latest_checkpoint(work.training / DENSE)[0] if DENSE in work.recipe.stages else None
    model, _ = _load(work, checkpoint, earlier)
    merge_adapters(model)
    model.save_pretrained(work.training / "merged")
    return work.training / "merged"


def _log(checkpoint: Path | None) -> list[dict[str, Any]]:
    """The log entries of a stage that ended with this checkpoint."""
    assert checkpoint is not None
    history = _read_object(checkpoint / TRAINER_STATE_NAME).get("log_history")
    if not isinstance(history, list):
        raise RunError(f"{checkpoint / TRAINER_STATE_NAME} has no log_history: start again with --overwrite")
    return history


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object that an earlier run wrote; RunError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} stands there where an object belongs")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}): start again with --overwrite") from error
    return found


def _out_of_memory(work: _Work, stage: str) -> str:
    recipe, windows = work.recipe, work.windows
    knobs = []
    if recipe.batch_size > 1:
        batch_size, accumulation = max(1, recipe.batch_size // 2), recipe.accumulation * 2
        knobs.append(f"--batch-size {batch_size} with --gradient-accumulation-steps {accumulation}")
    if not recipe.gradient_checkpointing and stage == SPARSE:
        knobs.append("--gradient-checkpointing")
    knobs.append(f"a --seqlen below {windows.seqlen:,}")
    if recipe.precision == "fp32":
        knobs.append("--precision bf16")
    knobs.append("more processes with FSDP (`accelerate launch --use_fsdp --fsdp_version 2`)")
    return (
        f"the GPU's memory is too small for the {stage} stage with --batch-size {recipe.batch_size} windows of "
        f"{windows.seqlen:,} tokens: try {', '.join(knobs)}; then go on as a new run or, where only the batch was "
        "split, from the last checkpoint"
    )


# ---- evaluation ---------------------------------------------------------------------------------------------------


def _before(work: _Work) -> dict[str, Any]:
    """The scores of the source, and of the pattern untrained; written down, so that a resumed run keeps them."""
    source, path = work.source, work.training / BEFORE_FILE
    scores: dict[str, Any] = {}
    if work.processes.is_first and path.exists():
        scores = _read_object(path)
    elif work.processes.is_first:
        dtype = source.written_dtype(work.run.dtype)
        untrained = source.load_untrained(dtype)
        same = not source.is_dense and untrained.config.share_pattern == source.pattern
        scores["source"] = _scores(untrained, work)
        del untrained
        set_seed(work.recipe.seed)
        model, new = source.load(dtype)
        if not new and not same:
            scores["before"] = _scores(model, work)
        work.training.mkdir(parents=True, exist_ok=True)
        write_json(path, scores)
    work.processes.wait()
    return scores


def _scores(model: Any, work: _Work) -> dict[str, Any]:
    assert work.held_out is not None
    model.to("cpu" if work.on_cpu else "cuda").eval()
    found = evaluate_windows(model, work.held_out.ids, work.held_out.recall)
    model.to("cpu")
    return {name: value for name, value in asdict(found).items() if value is not None}
