"""How a distillation is run: steps, rates, batches, precision, in one record that cards and journals can hold."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..runs.arguments import LARGEST_SEED
from ..runs.errors import RunError

DENSE, SPARSE = "dense", "sparse"
SCHEDULES = ("constant_with_warmup", "linear", "cosine")


@dataclass(frozen=True)
class Recipe:
    """Steps and rates of the two stages, and what both share.

    Defaults: steps are IndexCache's (arXiv 2603.12201, section 4.1), rates DeepSeek-V3.2's (report, section 2.1);
    neither publishes more. Small models want larger rates: docs/distillation.md.

    Args:
        dense_steps: steps of the warm-up, in which attention is dense and only indexers learn; 0 leaves it out.
        sparse_steps: steps in which attention reads the selected keys and everything learns.
        dense_learning_rate: of the indexers in the warm-up.
        learning_rate: of everything but the indexers in the sparse stage.
        indexer_learning_rate: of the indexers there; `learning_rate` when None.
        schedule: of the rates in each stage, after a linear rise.
        rise: share of a stage's steps in which its rate rises.
        batch_size: windows per process and micro-batch.
        accumulation: micro-batches per step.
        seqlen: tokens per window; None for 32 times top-k, or for what a file of windows holds.
        isolate_documents: documents packed into one window do not see each other.
        cross_layer: full layers learn from every layer that they serve; False: from themselves alone (ablation).
        kl_weight: factor of the divergence beside the language-model loss.
        weight_decay: of AdamW, on matrices.
        adam_beta2: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        precision: `bf16` (autocast, weights and optimiser in fp32) or `fp32`.
        gradient_checkpointing: run layers again in the backward pass of the sparse stage.
        cuda_graph: replay a step's forward, loss and backward as one CUDA graph (`graphed_step.py`).
        lora_rank: train low-rank adapters in place of all weights but the indexers'; None trains the weights.
        seed: of new indexers and of the order of windows.
        log_every: steps between log entries.
        save_every: steps between checkpoints.
        recall_queries: last queries of each window on which the attention mass of the selection is measured.
    """

    dense_steps: int = 1000
    sparse_steps: int = 4000
    dense_learning_rate: float = 1e-3
    learning_rate: float = 7.3e-6
    indexer_learning_rate: float | None = None
    schedule: str = "cosine"
    rise: float = 0.03
    batch_size: int = 1
    accumulation: int = 1
    seqlen: int | None = None
    isolate_documents: bool = False
    cross_layer: bool = True
    kl_weight: float = 1.0
    weight_decay: float = 0.0
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    gradient_checkpointing: bool = True
    cuda_graph: bool = False
    lora_rank: int | None = None
    seed: int = 0
    log_every: int = 10
    save_every: int = 200
    recall_queries: int = 64

    def __post_init__(self) -> None:
        for name, least in (
            ("dense_steps", 0),
            ("sparse_steps", 0),
            ("batch_size", 1),
            ("accumulation", 1),
            ("log_every", 1),
            ("save_every", 1),
            ("recall_queries", 0),
            ("lora_rank", 1),
            ("seqlen", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RunError(f"{_flag(name)} must be at least {least} (got {value})")
        if not self.dense_steps + self.sparse_steps:
            raise RunError("--dense-steps and --sparse-steps are both 0: there is nothing to train")
        self._check_rates()
        if self.schedule not in SCHEDULES:
            raise RunError(f"--lr-scheduler-type must be one of {', '.join(SCHEDULES)} (got {self.schedule!r})")
        if self.precision not in ("bf16", "fp32"):
            raise RunError(f"--precision must be bf16 or fp32 (got {self.precision!r})")
        if self.cuda_graph:
            self._check_graph()

    def _check_rates(self) -> None:
        """No number that makes weights NaN, or reverses gradients."""
        for name in ("dense_learning_rate", "learning_rate", "indexer_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RunError(f"{_flag(name)} must be positive and finite (got {value})")
        for name in ("kl_weight", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RunError(f"{_flag(name)} must be finite and at least 0 (got {getattr(self, name)})")
        if not self.kl_weight and self.dense_steps:
            raise RunError(
                "--kl-weight 0 leaves the warm-up nothing to learn from: give --dense-steps 0 or a weight above 0"
            )
        if not 0 <= self.rise <= 1:
            raise RunError(f"--warmup-ratio must lie in 0 .. 1 (got {self.rise})")
        if not 0 <= self.adam_beta2 < 1:
            raise RunError(f"adam_beta2 must lie in 0 .. 1, 1 left out (got {self.adam_beta2})")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise RunError(f"--seed must lie in 0 .. {LARGEST_SEED} (got {self.seed})")

    def _check_graph(self) -> None:
        """A graph holds whole steps of one kind, in memory."""
        if self.gradient_checkpointing:
            raise RunError(
                "--cuda-graph keeps a step's activations, --gradient-checkpointing drops them: give "
                "--no-gradient-checkpointing, or leave out --cuda-graph"
            )
        if self.accumulation > 1:
            raise RunError(
                f"--cuda-graph holds a whole step: give --gradient-accumulation-steps 1 (got {self.accumulation}) "
                "with a larger --batch-size, or leave out --cuda-graph"
            )
        if self.isolate_documents:
            raise RunError("--cuda-graph cannot look where documents begin: leave it out, or --isolate-documents")

    @property
    def stages(self) -> list[str]:
        """The stages that have steps, in order."""
        return [stage for stage in (DENSE, SPARSE) if self.steps(stage)]

    def steps(self, stage: str) -> int:
        """Steps of a stage."""
        return self.dense_steps if stage == DENSE else self.sparse_steps

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)


# Fields whose flag has another name.
_FLAGS = {"accumulation": "gradient-accumulation-steps", "log_every": "logging-steps", "save_every": "save-steps"}


def _flag(name: str) -> str:
    return f"--{_FLAGS.get(name, name.replace('_', '-'))}"
