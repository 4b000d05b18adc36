"""The arguments of `indexcache distill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..runs.arguments import (
    DATA_HELP,
    AsJson,
    DataSplit,
    Revision,
    Seqlen,
    TextField,
    Token,
    data_option,
    finite,
    in_panel,
    run_option,
)
from ..runs.command_line import print_json, show

if TYPE_CHECKING:
    from rich.console import RenderableType

_pattern, _training = in_panel("Pattern"), in_panel("Training")
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
    data: Annotated[str, data_option(help=DATA_HELP)],
    pattern: Annotated[str | None, _pattern(help="One letter per layer: F runs its indexer, S shares.")] = None,
    pattern_file: Annotated[Path | None, _pattern(help="JSON that the pattern search wrote.")] = None,
    keep: Annotated[
        str | None,
        _pattern(help="Evenly spaced full layers: 1/4, 0.25 or a count. With --pattern-file: which of its patterns."),
    ] = None,
    index_topk: Annotated[
        int | None, _pattern(min=1, help="Of a dense source: keys selected per query (2048).")
    ] = None,
    index_n_heads: Annotated[int | None, _pattern(min=1, help="Of a dense source: indexer heads (32).")] = None,
    index_head_dim: Annotated[
        int | None, _pattern(min=1, help="Of a dense source: width of an indexer head (128).")
    ] = None,
    dense_steps: Annotated[
        int, _training(min=0, help="Warm-up steps: attention is dense, only indexers learn.")
    ] = 1000,
    sparse_steps: Annotated[
        int, _training(min=0, help="Steps after it: attention is sparse, everything learns.")
    ] = 4000,
    dense_learning_rate: Annotated[
        float, _training(callback=finite, help="Of the indexers in the warm-up stage.")
    ] = 1e-3,
    learning_rate: Annotated[
        float, _training(callback=finite, help="Of everything else in the sparse stage.")
    ] = 7.3e-6,
    indexer_learning_rate: Annotated[
        float | None, _training(callback=finite, help="Of the indexers in the sparse stage. Default: --learning-rate.")
    ] = None,
    lr_scheduler_type: Annotated[
        Literal["cosine", "linear", "constant_with_warmup"],
        _training(help="Learning rate schedule of each stage, after its linear warm-up."),
    ] = "cosine",
    warmup_ratio: Annotated[
        float, _training(min=0, max=1, callback=finite, help="Share of each stage in which learning rates rise.")
    ] = 0.03,
    batch_size: Annotated[int, _training(min=1, help="Windows per process and micro-batch.")] = 1,
    gradient_accumulation_steps: Annotated[int, _training(min=1, help="Micro-batches per optimiser step.")] = 1,
    cross_layer: Annotated[
        bool, _training(help="Full layers learn from all layers they serve, not only from themselves.")
    ] = True,
    kl_weight: Annotated[float, _training(callback=finite, help="Weight of the KL divergence beside the loss.")] = 1.0,
    weight_decay: Annotated[float, _training(min=0, callback=finite, help="Of AdamW.")] = 0.0,
    max_grad_norm: Annotated[float, _training(callback=finite, help="Gradients are clipped to this norm.")] = 1.0,
    precision: Annotated[
        Literal["bf16", "fp32"], _training(help="Of the computation; weights and optimiser state are fp32.")
    ] = "bf16",
    gradient_checkpointing: Annotated[bool, _training(help="Recompute activations: less memory, more time.")] = True,
    cuda_graph: Annotated[
        bool,
        _training(
            "--cuda-graph",
            help="Replay steps as CUDA graphs: for small models, whose kernels take longer to launch than to run.",
        ),
    ] = False,
    lora_rank: Annotated[
        int | None,
        _training(min=1, help="Train adapters of this rank in place of all weights but the indexers' (needs peft)."),
    ] = None,
    held_out: Annotated[str | None, data_option(help="Data to evaluate on before and after training.")] = None,
    seqlen: Seqlen = None,
    isolate_documents: Annotated[
        bool, data_option("--isolate-documents", help="Documents in a window do not see each other.")
    ] = False,
    held_out_samples: Annotated[
        int | None, data_option(min=1, help="Held-out windows. Default: 16, or all of a file.")
    ] = None,
    seed: Annotated[int, data_option(min=0, help="Of new indexers and of the order of windows.")] = 0,
    data_split: DataSplit = "train",
    text_field: TextField = "text",
    logging_steps: Annotated[int, run_option(min=1, help="Steps between log entries.")] = 10,
    save_steps: Annotated[int, run_option(min=1, help="Steps between checkpoints.")] = 200,
    tensorboard: Annotated[bool, run_option(help="Write runs/ where TensorBoard is installed.")] = True,
    resume: Annotated[bool, run_option("--resume", help="Continue from the last checkpoint.")] = False,
    overwrite: Annotated[bool, run_option("--overwrite", help="Discard it and start anew.")] = False,
    keep_checkpoints: Annotated[bool, run_option("--keep-checkpoints", help="Keep training/ when done.")] = False,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        run_option(help="Of the written weights. auto: the source's."),
    ] = "auto",
    device: Annotated[Literal["cpu"] | None, run_option(help="cpu: do not use the GPU.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="ID", help="Then push to this Hub repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new Hub repository private.")] = False,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Train a model for its share pattern: multi-layer distillation, in two stages.

    Writes an IndexCache checkpoint. Dense MLA models (glm4_moe_lite, deepseek_v3) get new indexers. After an
    interruption repeat the command with --resume. `accelerate launch -m indexcache.cli distill ...` spreads it over
    GPUs, with FSDP where accelerate is configured so.
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
