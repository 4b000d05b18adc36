"""Arguments that several verbs of the command line take, said once; and options under the names they used to have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
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


def in_panel(name: str) -> Callable[..., Any]:
    """`typer.Option` of options that the help shows in a panel of this name."""
    return partial(typer.Option, rich_help_panel=name)


RUN_PANEL = "Where it runs"
data_option, run_option = in_panel("Data"), in_panel(RUN_PANEL)
DATA_HELP = (
    "Text, .jsonl, Parquet, a folder, .safetensors with NAME_ids windows (FILE:NAME), dataset (org/name:config)."
)

Seqlen = Annotated[int | None, data_option(min=1, help="Tokens per window. Default: 32 x top-k.")]
DataSplit = Annotated[str, data_option(help="Split of the dataset.")]
TextField = Annotated[str, data_option(help="Field that holds the text, in JSONL and datasets.")]
Overwrite = Annotated[bool, run_option("--overwrite", help="Discard the journal and start anew.")]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    run_option(help="Of weights and computation. auto: bfloat16 on CUDA, float32 elsewhere."),
]
Device = Annotated[str | None, run_option(help="cuda, cuda:1, cpu, ... Default: the GPU where there is one.")]
DeviceMap = Annotated[str | None, run_option(help="auto, balanced, ...: spread the model over devices.")]
Stream = Annotated[
    bool, run_option("--stream", help="Take layers from the checkpoint one by one: for models larger than memory.")
]
Pictures = Annotated[bool, typer.Option(help="Draw PNGs and report.html (needs matplotlib).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")]
Token = Annotated[str | None, typer.Option(help="Hub token; HF_TOKEN or the saved login when not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
