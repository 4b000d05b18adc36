"""transformers' Trainer with the distillation loss: one stage of a recipe.

Everything that Trainer and accelerate offer stays: precision, accumulation, DDP and FSDP2 under `accelerate launch`,
checkpoints with optimiser, schedule, data order and random state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...configuration.share_pattern import SharePattern
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ...modeling_indexcache.training.indexer_training import IndexerTraining
from ..errors import DistillationDiverged
from ..recipe import DENSE, SPARSE, Recipe
from .adapters import save_adapters
from .finite import are_finite, first_not_finite
from .graphed_step import GraphedSteps, refuse_where_no_graphs_run
from .losses import group_means, multi_layer_loss
from .sharded_training import spread_by_accelerate

INDEXER_MARK = ".indexer."
# A loss this many times its start, and one nat more, will not come back.
DIVERGED_FACTOR = 2.0
# The number of micro-batches among the sums that a checkpoint keeps.
_MICRO_BATCHES = "micro_batches"
# Steps whose mean loss is the start.
START_STEPS = 5


def freeze_for(stage: str, model: nn.Module, adapters_only: bool = False) -> None:
    """Say which weights learn: in the dense stage the indexers, in the sparse stage everything.

    Args:
        stage: `dense` or `sparse`.
        model: whose parameters are marked.
        adapters_only: of the weights outside the indexers, only low-rank adapters learn.
    """
    for name, parameter in model.named_parameters():
        learns = stage == SPARSE and (not adapters_only or "lora_" in name)
        parameter.requires_grad_(INDEXER_MARK in name or learns)


def training_arguments(stage: str, recipe: Recipe, output: Path, use_cpu: bool = False) -> TrainingArguments:
    """The recipe's stage in Trainer's words; checkpoints go to `output`."""
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps(stage),
        learning_rate=recipe.dense_learning_rate if stage == DENSE else recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=math.ceil(recipe.rise * recipe.steps(stage)),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        # The warm-up's frozen layers leave nothing to run again but the indexers.
        activation_checkpointing=recipe.gradient_checkpointing and stage == SPARSE,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=min(recipe.log_every, max(1, recipe.steps(stage))),
        logging_nan_inf_filter=False,
        save_steps=recipe.save_every,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=not use_cpu,
        # Batches are copied while the GPU is still at the step before.
        accelerator_config={"non_blocking": not use_cpu},
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        use_cpu=use_cpu,
    )
    # One process takes one GPU: Trainer would spread it over all that it sees by DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class DistillationTrainer(Trainer):
    """Trains one stage.

    Beside Trainer's own entries the log holds `lm_loss`, `kl` (the loss L_multi), `kl/full_LL` (mean over the layers
    that full layer LL serves), `kl/layer_LL`, `recall` and `recall/layer_LL` (the share of attention's mass that the
    selection holds), in nats and shares of one, means over the steps since the last entry.

    Args:
        model: in fp32, whose running pattern is its config's.
        stage: `dense` or `sparse`.
        recipe: rates, batches, loss.
        args: from `training_arguments`.
        train_dataset: of `input_ids`, `labels` and `shift_labels`.
        check_every: steps between looks whether loss, gradient and updated weights are finite; each waits for the
            device.
        **kwargs: as `Trainer`.
    """

    # The loss below is divided by the tokens of all micro-batches and processes.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: IndexCacheForCausalLM,
        stage: str,
        recipe: Recipe,
        args: TrainingArguments,
        train_dataset: Dataset,
        *,
        check_every: int = 1,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        self.stage, self.recipe, self.check_every = stage, recipe, check_every
        self.pattern: SharePattern = model.config.share_pattern
        self.tokens_in_step: torch.Tensor | int = 1
        self._found: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._micro_batches = 0
        self._flops: dict[torch.Size, int] = {}
        self._start_loss: list[float] = []
        use_cache = model.config.use_cache
        super().__init__(model, args, train_dataset=train_dataset, callbacks=callbacks, **kwargs)
        # Trainer switches it off in the config that checkpoints hold; a training forward makes no cache anyway.
        model.config.use_cache = use_cache
        # Progress is the monitor's business.
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)
        self.add_callback(_UpdateCheck(self))
        refuse_where_no_graphs_run(recipe, args.device.type != "cuda", self.accelerator.num_processes)
        self._graphs: GraphedSteps | None = None

    # ---- loss ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """L_multi, and in the sparse stage the language-model loss; see `Trainer.compute_loss`."""
        inputs = dict(inputs)
        tokens = _real_tokens(inputs)
        if self.stage == DENSE:
            inputs.pop("labels", None)
            inputs.pop("shift_labels", None)
        else:
            inputs["num_items_in_batch"] = num_items_in_batch
        training = IndexerTraining(
            self.stage, self.recipe.cross_layer, self.recipe.recall_queries if self._logs_this_step() else 0
        )
        outputs = model(**inputs, indexer_training=training, skip_logits=True, use_cache=False)
        # The same weight for every token, however they are spread over micro-batches and processes.
        processes = self.accelerator.num_processes
        share = tokens / self.tokens_in_step * processes
        kl = multi_layer_loss(outputs.indexer_kl, self.pattern, self.recipe.cross_layer) * share
        loss = self.recipe.kl_weight * kl
        if outputs.loss is not None:
            loss = loss + outputs.loss * processes
        self._found = _found(outputs, kl, share, processes)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As `Trainer.training_step`; a loss that is not finite stops before it can reach the weights.

        Raises:
            DistillationDiverged: on all processes at once.
        """
        if self.recipe.cuda_graph:
            loss = self._graphed_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._note(loss)
        if self._checks_this_step():
            self._check(loss)
        return loss

    def _graphed_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """`Trainer.training_step` from a CUDA graph; steps that measure recall have one of their own."""
        if self._graphs is None:
            self._graphs = GraphedSteps(functools.partial(self._run_step, model), model.parameters)
        given = {**inputs, "num_items_in_batch": num_items_in_batch, "tokens_in_step": self.tokens_in_step}
        found = dict(self._graphs.step(given, self._logs_this_step()))
        loss = found.pop("loss").clone()
        self._found = found
        return loss

    def _run_step(self, model: nn.Module, given: dict[str, Any], logs: Hashable) -> dict[str, torch.Tensor]:
        """What a graph captures: the loss, and what the log wants to know, with gradients at the parameters."""
        inputs = dict(given)
        num_items_in_batch, self.tokens_in_step = inputs.pop("num_items_in_batch"), inputs.pop("tokens_in_step")
        loss = super().training_step(model, inputs, num_items_in_batch)
        return {"loss": loss, **self._found}

    # ---- what must be finite ------------------------------------------------------------------------------------

    def _checks_this_step(self) -> bool:
        return self.state.global_step % self.check_every == 0

    def _check(self, loss: torch.Tensor) -> None:
        worst = self.accelerator.reduce(loss.detach().float(), "sum")
        value = float(worst) / self.accelerator.num_processes
        step = self.state.global_step + 1
        if not math.isfinite(value):
            raise self._diverged(f"the loss of the {self.stage} stage became {value} at step {step}")
        value *= self.recipe.accumulation
        if len(self._start_loss) < START_STEPS:
            self._start_loss.append(value)
            return
        start = sum(self._start_loss) / len(self._start_loss)
        if value > DIVERGED_FACTOR * start + 1:
            rose = f"the loss of the {self.stage} stage rose from {start:.3f} to {value:.3f} at step {step}"
            raise self._diverged(rose, by_precision=False)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As Trainer's; a gradient that is not finite stops before it can reach the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self._checks_this_step():
            value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            if not math.isfinite(value):
                step = self.state.global_step + 1
                raise self._diverged(f"the gradient of the {self.stage} stage has the norm {value} at step {step}")
        return norm

    def check_update(self) -> None:
        """Look at the weights that the optimiser has just changed.

        Raises:
            DistillationDiverged: one is not finite; on all processes at once.
        """
        if not self._checks_this_step():
            return
        optimizer: Any = self.optimizer
        model: Any = self.model
        learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        finite = are_finite(learned).to(self.args.device, torch.float32)
        if bool(self.accelerator.reduce(finite, "sum") == self.accelerator.num_processes):
            return
        # Of sharded weights the damaged ones may be another process's.
        name = first_not_finite(model.named_parameters()) or "a weight of another process's shard"
        update = f"the update of step {self.state.global_step + 1} of the {self.stage} stage"
        what = f"{update} left weights that are not finite ({name})"
        raise self._diverged(what, by_precision=False, weights_are_sound=False)

    def _diverged(self, what: str, by_precision: bool = True, weights_are_sound: bool = True) -> DistillationDiverged:
        """The error that says what happened and what helps: a lower rate, and where it may be precision, fp32."""
        rate = f"--learning-rate ({self.recipe.learning_rate:g})"
        if self.stage == DENSE:
            rate = f"--dense-learning-rate ({self.recipe.dense_learning_rate:g})"
        rest = ", raise --warmup-ratio, or try --precision fp32" if by_precision else ", or raise --warmup-ratio"
        return DistillationDiverged(f"{what}: lower {rate}{rest}", weights_are_sound)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """As Trainer counts targets, count the tokens whose divergence is averaged."""
        count = float(sum(_real_tokens(batch) for batch in batch_samples))
        # Filled there: a copy would wait for the device.
        tokens = torch.full((), count, device=device)
        self.tokens_in_step = self.accelerator.reduce(tokens, "sum")
        return super()._get_num_items_in_batch(batch_samples, device)

    # ---- log ----------------------------------------------------------------------------------------------------

    def _logs_this_step(self) -> bool:
        return (self.state.global_step + 1) % self.args.logging_steps == 0

    @torch.no_grad()
    def _note(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss, and what it found, to the sums of the next log entry."""
        for name, value in (("loss", loss.detach()), *self._found.items()):
            self._sums[name] = self._sums.get(name, 0) + value
        self._micro_batches += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with what was noted since the last entry."""
        if "loss" in logs and self._sums:
            logs = {**logs, **self._noted()}
        super().log(logs, start_time)

    def _noted(self) -> dict[str, float]:
        steps = max(1, self._micro_batches / self.recipe.accumulation)
        mean = {name: self.accelerator.reduce(value, "mean").cpu() for name, value in self._sums.items()}
        self._sums, self._micro_batches = {}, 0
        # Trainer's own mean loss forgets, at a resume, the steps before it.
        scalars = ("loss", "lm_loss", "kl")
        entries: dict[str, float] = {name: float(mean[name] / steps) for name in scalars if name in mean}
        layers = mean["layers"] / steps
        entries |= {f"kl/full_{full:02}": float(value) for full, value in group_means(layers, self.pattern).items()}
        entries |= {f"kl/layer_{layer:02}": float(value) for layer, value in enumerate(layers)}
        if "recall" in mean:
            # Measured on the last step alone.
            entries["recall"] = float(mean["recall"].mean())
            entries |= {f"recall/layer_{layer:02}": float(value) for layer, value in enumerate(mean["recall"])}
        return entries

    def _save_rng_state(self, output_dir: str) -> None:
        """As Trainer's; the sums of a log entry that is not written yet go along, each process's own."""
        super()._save_rng_state(output_dir)
        sums = {name: value.detach().cpu().contiguous() for name, value in self._sums.items()}
        micro_batches = torch.tensor(self._micro_batches, dtype=torch.int64)
        save_file({**sums, _MICRO_BATCHES: micro_batches}, self._sums_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As Trainer's, with what `_save_rng_state` put beside it."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._sums_file(checkpoint).is_file():
            kept = load_file(self._sums_file(checkpoint))
            self._micro_batches = int(kept.pop(_MICRO_BATCHES))
            self._sums = {name: value.to(self.args.device) for name, value in kept.items()}

    def _sums_file(self, folder: str) -> Path:
        return Path(folder) / f"log_sums_{self.args.process_index}.safetensors"

    # ---- weights ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a rate of their own for the indexers."""
        if self.optimizer is not None:
            return self.optimizer
        trained: Any = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(trained))
        rest_rate = self.args.learning_rate
        indexer_rate = rest_rate if self.stage == DENSE else self.recipe.indexer_learning_rate or rest_rate
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((INDEXER_MARK in name, name in decayed), []).append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": indexer_rate if is_indexer else rest_rate,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (is_indexer, decays), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As `Trainer.floating_point_ops`; the model's weights are counted once, not at every step."""
        shape = inputs["input_ids"].shape
        if shape not in self._flops:
            self._flops[shape] = super().floating_point_ops(inputs)
        return self._flops[shape]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer._prepare_for_training`; a sharded model comes from what the first process read."""
        sharded = self.is_fsdp_enabled and self.accelerator.num_processes > 1
        with spread_by_accelerate(self.model) if sharded else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As `Trainer._save`; with adapters what is trained alone."""
        if self.recipe.lora_rank is None or self.stage == DENSE:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapters(self.model, Path(output_dir or str(self.args.output_dir)), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the model was made from the checkpoint, before it was sharded where it is.

        Trainer would match names in the file with names in the module, which differ for experts, and keep whatever
        does not match as it is.
        """


class _UpdateCheck(TrainerCallback):
    """Looks at every update before the step counts, so that none is saved that spoilt the weights."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`."""
        self._trainer.check_update()


def _found(outputs: Any, kl: torch.Tensor, share: torch.Tensor | float, processes: int) -> dict[str, torch.Tensor]:
    """A micro-batch's part of a log entry."""
    found = {"kl": kl, "layers": outputs.indexer_kl * share}
    if outputs.loss is not None:
        found["lm_loss"] = outputs.loss * processes
    if outputs.attention_recall is not None:
        found["recall"] = outputs.attention_recall * share
    return {name: value.detach().float() for name, value in found.items()}


def _real_tokens(inputs: dict[str, Any]) -> int | float:
    """Tokens of a batch that are no padding."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else float(mask.sum())
