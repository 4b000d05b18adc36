"""Arguments that several verbs of the command line take, said once."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import typer

# NumPy's generator takes no larger one.
LARGEST_SEED = 2**32 - 1


def finite(value: float | None) -> float | None:
    """The callback of every option that takes a float: click's ranges let NaN, and open ones infinity, pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


DATA_PANEL, RUN_PANEL = "Data", "Where it runs"
DATA_HELP = (
    "Text, .jsonl, Parquet, a folder, .safetensors with NAME_ids windows (FILE:NAME), dataset (org/name:config)."
)

Seqlen = Annotated[
    int | None, typer.Option(min=1, help="Tokens a window. Default: 32 x top-k.", rich_help_panel=DATA_PANEL)
]
DataSplit = Annotated[str, typer.Option(help="Split of a dataset.", rich_help_panel=DATA_PANEL)]
TextField = Annotated[str, typer.Option(help="Of JSONL and datasets.", rich_help_panel=DATA_PANEL)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Forget the journal.", rich_help_panel=RUN_PANEL)]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(help="auto: bfloat16 on CUDA, float32 elsewhere.", rich_help_panel=RUN_PANEL),
]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, ...", rich_help_panel=RUN_PANEL)]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto, balanced, ...: spread the model.", rich_help_panel=RUN_PANEL)
]
Pictures = Annotated[bool, typer.Option(help="Draw PNGs and report.html (needs matplotlib).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")]
Token = Annotated[str | None, typer.Option(help="Hub token; HF_TOKEN or the saved login when not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
