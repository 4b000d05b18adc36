"""Arguments that several verbs of the command line take, said once; and options under the names they used to have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

# NumPy's generator takes no larger one.
LARGEST_SEED = 2**32 - 1


def finite(value: float | None) -> float | None:
    """The callback of every option that takes a float: click's ranges let NaN, and open ones infinity, pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def takes_old_names(renamed: dict[str, str]) -> type[TyperCommand]:
    """The `cls` of a command whose options were renamed, old name to new: old ones work for one release, with a note.

    The help shows the new names alone, and errors of the values name them.
    """

    class _Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, list(_with_new_names(args, renamed)))

    return _Command


def _with_new_names(args: list[str], renamed: dict[str, str]) -> Iterator[str]:
    given = iter(args)
    for arg in given:
        name, equals, value = arg.partition("=")
        if name in renamed:
            typer.echo(f"note: {name} is called {renamed[name]} now; the next release drops the old name", err=True)
            arg = renamed[name] + equals + value
        yield arg
        if arg == "--":
            yield from given


DATA_PANEL, RUN_PANEL = "Data", "Where it runs"
DATA_HELP = (
    "Text, .jsonl, Parquet, a folder, .safetensors with NAME_ids windows (FILE:NAME), dataset (org/name:config)."
)

Seqlen = Annotated[
    int | None, typer.Option(min=1, help="Tokens per window. Default: 32 x top-k.", rich_help_panel=DATA_PANEL)
]
DataSplit = Annotated[str, typer.Option(help="Split of the dataset.", rich_help_panel=DATA_PANEL)]
TextField = Annotated[
    str, typer.Option(help="Field that holds the text, in JSONL and datasets.", rich_help_panel=DATA_PANEL)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Discard the journal and start anew.", rich_help_panel=RUN_PANEL)
]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(
        help="Of weights and computation. auto: bfloat16 on CUDA, float32 elsewhere.", rich_help_panel=RUN_PANEL
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cuda, cuda:1, cpu, ... Default: the GPU where there is one.", rich_help_panel=RUN_PANEL),
]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto, balanced, ...: spread the model over devices.", rich_help_panel=RUN_PANEL)
]
Pictures = Annotated[bool, typer.Option(help="Draw PNGs and report.html (needs matplotlib).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")]
Token = Annotated[str | None, typer.Option(help="Hub token; HF_TOKEN or the saved login when not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
