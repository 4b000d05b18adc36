"""The arguments of `indexcache eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..conversion.io.terminal_text import tell
from ..runs.arguments import (
    DATA_HELP,
    DATA_PANEL,
    RUN_PANEL,
    AsJson,
    DataSplit,
    Device,
    DeviceMap,
    Dtype,
    Overwrite,
    Pictures,
    Revision,
    Seqlen,
    TextField,
    Token,
)
from ..runs.command_line import print_json

_RETRIEVAL = "Retrieval"


def evaluate(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="DSA or IndexCache checkpoints: folders, or Hub ids.")
    ],
    pattern: Annotated[
        list[str] | None, typer.Option(help="Run each checkpoint with this share pattern too; repeat.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="perplexity, retrieval, overlap; repeat. Default: all; without --data retrieval."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for evaluation.json, journal, pictures and report.")] = Path(
        "indexcache_eval"
    ),
    data: Annotated[
        str | None,
        typer.Option(
            help=DATA_HELP,
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    seqlen: Seqlen = None,
    nsamples: Annotated[
        int | None,
        typer.Option(min=1, help="Windows. Default: 16, or all of a file.", rich_help_panel=DATA_PANEL),
    ] = None,
    seed: Annotated[int, typer.Option(help="For the choice of windows and prompts.", rich_help_panel=DATA_PANEL)] = 0,
    data_split: DataSplit = "train",
    text_field: TextField = "text",
    prompt: Annotated[
        Literal["records", "passkey"],
        typer.Option(
            help="records: a fact at every depth, all asked for. passkey: one number in plain words.",
            rich_help_panel=_RETRIEVAL,
        ),
    ] = "records",
    length: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Context length; repeat. Default: 8, 16, 32 x top-k.", rich_help_panel=_RETRIEVAL),
    ] = None,
    depths: Annotated[
        int, typer.Option(min=1, help="Number of depths, from start to end.", rich_help_panel=_RETRIEVAL)
    ] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Samples per length.", rich_help_panel=_RETRIEVAL)] = 8,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows or prompts per forward pass.", rich_help_panel=RUN_PANEL)
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the journal, or add to it.", rich_help_panel=RUN_PANEL)
    ] = False,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    pictures: Pictures = True,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Compare checkpoints, and patterns of one: loss, retrieval by length and depth, overlap of selections.

    Every batch is journaled: after an interruption, or to add a checkpoint, pattern or task, repeat the command with
    --resume.
    """
    from ..runs.loading import Placement
    from ..runs.monitor import Monitor, TerminalMonitor
    from ..runs.windows.window_sources import Sampling
    from .run import EvaluationOptions, run_evaluation

    options = EvaluationOptions(
        tasks=tuple(task) if task else None,
        data=data,
        patterns=tuple(pattern or ()),
        sampling=Sampling(seqlen, nsamples, seed, data_split, text_field),
        prompt=prompt,
        lengths=tuple(sorted(set(length))) if length else None,
        depths=depths,
        samples=samples,
        batch_size=batch_size,
    )
    document = run_evaluation(
        paths,
        options,
        output,
        placement=Placement(dtype, device, device_map, False, revision, token),
        resume=resume,
        overwrite=overwrite,
        monitor=Monitor() if as_json else TerminalMonitor(),
    )
    from .report import draw_tables, write_report

    if pictures:
        try:
            write_report(document, output)
        except ImportError:
            if not as_json:
                tell("no pictures: pip install matplotlib", err=True)
    if as_json:
        print_json(document)
        return
    from ..runs.pages.terminal import terminal

    console = terminal()
    console.print(draw_tables(document))
    console.print(f"{output}: evaluation.json" + (", report.html" if (output / "report.html").exists() else ""))
