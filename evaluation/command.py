"""The arguments of `indexcache eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..runs.arguments import (
    DATA_HELP,
    AsJson,
    DataSplit,
    Device,
    DeviceMap,
    Dtype,
    Overwrite,
    Pictures,
    Revision,
    Seqlen,
    Stream,
    TextField,
    Token,
    data_option,
    in_panel,
    run_option,
)
from ..runs.command_line import draw_page, print_json, show_result

_retrieval = in_panel("Retrieval")


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
    data: Annotated[str | None, data_option(help=DATA_HELP)] = None,
    seqlen: Seqlen = None,
    nsamples: Annotated[int | None, data_option(min=1, help="Windows. Default: 16, or all of a file.")] = None,
    seed: Annotated[int, data_option(help="For the choice of windows and prompts.")] = 0,
    data_split: DataSplit = "train",
    text_field: TextField = "text",
    prompt: Annotated[
        Literal["records", "passkey"],
        _retrieval(help="records: a fact at every depth, all asked for. passkey: one number in plain words."),
    ] = "records",
    length: Annotated[
        list[int] | None, _retrieval(min=1, help="Context length; repeat. Default: 8, 16, 32 x top-k.")
    ] = None,
    depths: Annotated[int, _retrieval(min=1, help="Number of depths, from start to end.")] = 5,
    samples: Annotated[int, _retrieval(min=1, help="Samples per length.")] = 8,
    batch_size: Annotated[int, run_option(min=1, help="Windows or prompts per forward pass.")] = 1,
    resume: Annotated[bool, run_option("--resume", help="Continue from the journal, or add to it.")] = False,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    stream: Stream = False,
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
    from .run import EVALUATION_FILE, EvaluationOptions, run_evaluation

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
        stream=stream,
        monitor=Monitor() if as_json else TerminalMonitor(),
    )
    from .report import draw_tables, write_report

    if pictures:
        draw_page(lambda: write_report(document, output), as_json)
    if as_json:
        print_json(document)
    else:
        show_result(draw_tables(document), output, EVALUATION_FILE)
