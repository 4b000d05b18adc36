"""The arguments of `indexcache distill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..runs.arguments import (
    DATA_HELP,
    DATA_PANEL,
    RUN_PANEL,
    AsJson,
    DataSplit,
    Revision,
    Seqlen,
    TextField,
    Token,
    finite,
)
from ..runs.command_line import print_json, show

if TYPE_CHECKING:
    from rich.console import RenderableType

_WHAT, _STAGES = "Pattern", "Training"
# What options were called in 0.1.
RENAMED = {
    "--rise": "--warmup-ratio",
    "--accumulation": "--gradient-accumulation-steps",
    "--schedule": "--lr-scheduler-type",
    "--log-every": "--logging-steps",
    "--save-every": "--save-steps",
    "--index-heads": "--index-n-heads",
}


def distill(
    source: Annotated[str, typer.Argument(help="DSA, IndexCache or dense MLA checkpoint: a folder, or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    data: Annotated[
        str,
        typer.Option(help=DATA_HELP, rich_help_panel=DATA_PANEL),
    ],
    pattern: Annotated[
        str | None,
        typer.Option(help="One letter per layer: F runs its indexer, S shares.", rich_help_panel=_WHAT),
    ] = None,
    pattern_file: Annotated[
        Path | None, typer.Option(help="JSON that the pattern search wrote.", rich_help_panel=_WHAT)
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Evenly spaced full layers: 1/4, 0.25 or a count. With --pattern-file: which of its patterns.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    index_topk: Annotated[
        int | None,
        typer.Option(min=1, help="Of a dense source: keys selected per query (2048).", rich_help_panel=_WHAT),
    ] = None,
    index_n_heads: Annotated[
        int | None, typer.Option(min=1, help="Of a dense source: indexer heads (32).", rich_help_panel=_WHAT)
    ] = None,
    index_head_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Of a dense source: width of an indexer head (128).", rich_help_panel=_WHAT),
    ] = None,
    dense_steps: Annotated[
        int,
        typer.Option(min=0, help="Warm-up steps: attention is dense, only indexers learn.", rich_help_panel=_STAGES),
    ] = 1000,
    sparse_steps: Annotated[
        int,
        typer.Option(min=0, help="Steps after it: attention is sparse, everything learns.", rich_help_panel=_STAGES),
    ] = 4000,
    dense_learning_rate: Annotated[
        float, typer.Option(callback=finite, help="Of the indexers in the warm-up stage.", rich_help_panel=_STAGES)
    ] = 1e-3,
    learning_rate: Annotated[
        float, typer.Option(callback=finite, help="Of everything else in the sparse stage.", rich_help_panel=_STAGES)
    ] = 7.3e-6,
    indexer_learning_rate: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            help="Of the indexers in the sparse stage. Default: --learning-rate.",
            rich_help_panel=_STAGES,
        ),
    ] = None,
    lr_scheduler_type: Annotated[
        Literal["cosine", "linear", "constant_with_warmup"],
        typer.Option(help="Learning rate schedule of each stage, after its linear warm-up.", rich_help_panel=_STAGES),
    ] = "cosine",
    warmup_ratio: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            callback=finite,
            help="Share of each stage in which learning rates rise.",
            rich_help_panel=_STAGES,
        ),
    ] = 0.03,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows per process and micro-batch.", rich_help_panel=_STAGES)
    ] = 1,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(min=1, help="Micro-batches per optimiser step.", rich_help_panel=_STAGES)
    ] = 1,
    cross_layer: Annotated[
        bool,
        typer.Option(
            help="Full layers learn from all layers they serve, not only from themselves.", rich_help_panel=_STAGES
        ),
    ] = True,
    kl_weight: Annotated[
        float,
        typer.Option(callback=finite, help="Weight of the KL divergence beside the loss.", rich_help_panel=_STAGES),
    ] = 1.0,
    weight_decay: Annotated[
        float, typer.Option(min=0, callback=finite, help="Of AdamW.", rich_help_panel=_STAGES)
    ] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(callback=finite, help="Gradients are clipped to this norm.", rich_help_panel=_STAGES)
    ] = 1.0,
    precision: Annotated[
        Literal["bf16", "fp32"],
        typer.Option(help="Of the computation; weights and optimiser state are fp32.", rich_help_panel=_STAGES),
    ] = "bf16",
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations: less memory, more time.", rich_help_panel=_STAGES)
    ] = True,
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph",
            help="Replay steps as CUDA graphs: for small models, whose kernels take longer to launch than to run.",
            rich_help_panel=_STAGES,
        ),
    ] = False,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train adapters of this rank in place of all weights but the indexers' (needs peft).",
            rich_help_panel=_STAGES,
        ),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Data to evaluate on before and after training.", rich_help_panel=DATA_PANEL)
    ] = None,
    seqlen: Seqlen = None,
    isolate_documents: Annotated[
        bool,
        typer.Option(
            "--isolate-documents",
            help="Documents in a window do not see each other.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = False,
    held_out_samples: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out windows. Default: 16, or all of a file.", rich_help_panel=DATA_PANEL),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of new indexers and of the order of windows.", rich_help_panel=DATA_PANEL)
    ] = 0,
    data_split: DataSplit = "train",
    text_field: TextField = "text",
    logging_steps: Annotated[
        int, typer.Option(min=1, help="Steps between log entries.", rich_help_panel=RUN_PANEL)
    ] = 10,
    save_steps: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=RUN_PANEL)
    ] = 200,
    tensorboard: Annotated[
        bool, typer.Option(help="Write runs/ where TensorBoard is installed.", rich_help_panel=RUN_PANEL)
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.", rich_help_panel=RUN_PANEL)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard it and start anew.", rich_help_panel=RUN_PANEL)
    ] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep training/ when done.", rich_help_panel=RUN_PANEL)
    ] = False,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of the written weights. auto: the source's.", rich_help_panel=RUN_PANEL),
    ] = "auto",
    device: Annotated[
        Literal["cpu"] | None, typer.Option(help="cpu: do not use the GPU.", rich_help_panel=RUN_PANEL)
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="ID", help="Then push to this Hub repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new Hub repository private.")] = False,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Train a model for its share pattern: multi-layer distillation, in two stages.

    Writes an IndexCache checkpoint. Dense MLA models (glm4_moe_lite, deepseek_v3) get new indexers. After an
    interruption repeat the command with --resume. `accelerate launch -m indexcache.cli distill ...` spreads it over
    GPUs, with FSDP where accelerate is told so.
    """
    from ..runs.errors import RunError
    from ..runs.monitor import Monitor, TerminalMonitor
    from ..runs.processes import Processes
    from ..runs.windows.window_sources import Sampling
    from .recipe import Recipe
    from .run import run_distillation
    from .run_options import DistillationRun
    from .source import IndexerShape, open_distillation_source

    if private and push_to_hub is None:
        raise RunError("--private belongs to --push-to-hub ID")
    recipe = Recipe(
        dense_steps=dense_steps,
        sparse_steps=sparse_steps,
        dense_learning_rate=dense_learning_rate,
        learning_rate=learning_rate,
        indexer_learning_rate=indexer_learning_rate,
        schedule=lr_scheduler_type,
        rise=warmup_ratio,
        batch_size=batch_size,
        accumulation=gradient_accumulation_steps,
        seqlen=seqlen,
        isolate_documents=isolate_documents,
        cross_layer=cross_layer,
        kl_weight=kl_weight,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        cuda_graph=cuda_graph,
        lora_rank=lora_rank,
        seed=seed,
        log_every=logging_steps,
        save_every=save_steps,
    )
    run = DistillationRun(
        data,
        output,
        held_out,
        Sampling(None, held_out_samples, seed, data_split, text_field),
        resume,
        overwrite,
        dtype,
        device,
        tensorboard,
        keep_checkpoints,
        push_to_hub,
    )
    shape = IndexerShape(index_topk, index_n_heads, index_head_dim)
    opened = open_distillation_source(source, pattern, pattern_file, keep, shape, revision=revision, token=token)
    document = run_distillation(opened, recipe, run, Monitor() if as_json else TerminalMonitor())
    if not Processes.from_environment().is_first:
        return
    url = None
    if push_to_hub:
        from ..conversion.publish.command import announcer
        from ..conversion.publish.hub import push_folder

        url = push_folder(output, push_to_hub, private=private or None, token=token, announce=announcer(as_json))
    if as_json:
        print_json({"output": str(output), **document, "url": url})
    else:
        show(_summary(document, output, url))


def _summary(document: dict[str, Any], output: Path, url: str | None) -> RenderableType:
    """What it scored, and where it is."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from .output import SCORED

    lines = [f"{output}: an IndexCache checkpoint of pattern {document['index_share_pattern']}"]
    if url:
        lines.append(f"pushed: {url}")
    scores = document["scores"]
    if not scores:
        return Group(*map(Text, lines))
    table = Table("held-out windows", "loss", "text loss", "recall")
    for key, label in SCORED.items():
        if key in scores:
            found = scores[key]
            recall = f"{found['recall_accuracy']:.3f}" if "recall_accuracy" in found else ""
            table.add_row(label, f"{found['loss']:.4f}", f"{found['text_loss']:.4f}", recall)
    return Group(table, *map(Text, lines))
