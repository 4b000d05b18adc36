"""The arguments of `indexcache bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...conversion.io.terminal_text import tell
from ...runs.arguments import RUN_PANEL, AsJson, Device, Overwrite, Pictures, Revision, Token
from ...runs.command_line import print_json

if TYPE_CHECKING:
    from .speed_plan import Row

_WHAT = "What to measure"
# What options were called in 0.1.
RENAMED = {
    "--parts": "--breakdown",
    "--no-parts": "--no-breakdown",
    "--peer": "--baseline",
    "--peer-length": "--baseline-length",
}
LENGTHS = {"cuda": (10_000, 60_000, 120_000, 200_000), "cpu": (512, 1024, 2048)}


def bench(
    source: Annotated[
        str | None, typer.Argument(help="DSA or IndexCache checkpoint, folder or Hub id. Default: --shape.")
    ] = None,
    shape: Annotated[
        Literal["30b", "tiny", "v3.2", "glm-5"] | None,
        typer.Option(
            help="Random weights: the paper's 30B model, a tiny one, or 4 layers of DeepSeek-V3.2 or GLM-5 at full "
            "width. Default: 30b on CUDA, else tiny."
        ),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Routed experts of the shape; 16 of 64 do the same work in less memory.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of the shape.")] = None,
    narrow: Annotated[
        bool, typer.Option("--narrow", help="Small widths for v3.2 and glm-5, to try them without a GPU.")
    ] = False,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Context length; repeat. Default: the paper's on CUDA.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            help="'all full', 1/4, own, or letters; repeat. Compared with the first. For 47 layers, the paper's."
        ),
    ] = None,
    input: Annotated[
        Literal["drift", "random"] | None,
        typer.Option(
            help="drift: neighbouring tokens select alike, as in trained models (default). random: tokens at random.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(help="Caches of generate(): static, dynamic; repeat. Default: static.", rich_help_panel=_WHAT),
    ] = None,
    decode_steps: Annotated[int, typer.Option(min=4, help="Generated tokens to time.", rich_help_panel=_WHAT)] = 32,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Also decode so many sequences with a full cache; repeat. 0: as many as fit.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    breakdown: Annotated[
        bool, typer.Option(help="Also time indexer, attention, experts and projections.", rich_help_panel=_WHAT)
    ] = True,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Run transformers' own glm_moe_dsa too.", rich_help_panel=_WHAT)
    ] = False,
    baseline_length: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Its context lengths; repeat. Default: the shortest.", rich_help_panel=_WHAT),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Calls per measurement; the best counts.", rich_help_panel=_WHAT)
    ] = 2,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="JSON file that lists the measurements in their order, in place of the options.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for bench.json, journal, pictures and report.")] = Path(
        "indexcache_bench"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the journal.", rich_help_panel=RUN_PANEL)
    ] = False,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32", "fp8"],
        typer.Option(
            help="Of weights and computation. auto: bfloat16 on CUDA, float32 elsewhere. fp8: weights of a shape in "
            "block fp8, the rest as auto.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = "auto",
    pictures: Pictures = True,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Measure prefill and decode by context length and pattern.

    Every row is journaled: after an interruption, repeat the command with --resume.
    """
    import torch

    from ...runs.errors import RunError
    from ...runs.loading import check_device
    from .speed_plan import read_plan
    from .speed_run import BenchOptions, run_bench

    kind = check_device(device).type if device else ("cuda" if torch.cuda.is_available() else "cpu")
    ways = tuple(dict.fromkeys(cache or ["static"]))
    if unknown := set(ways) - {"static", "dynamic"}:
        raise RunError(f"--cache must be static or dynamic (got {', '.join(sorted(unknown))})")
    if source is not None and (shape or experts or layers or narrow):
        raise RunError(
            "--shape, --experts, --layers and --narrow make a model with random weights: leave out the checkpoint"
        )
    if source is not None and dtype == "fp8":
        raise RunError("--dtype fp8 makes random weights of a shape: a checkpoint in fp8 runs so by itself")
    if narrow and shape not in ("v3.2", "glm-5"):
        raise RunError("--narrow is for --shape v3.2 and glm-5")
    if plan is not None and (length or pattern or cache or batch_size or baseline or baseline_length):
        raise RunError(
            "--plan says itself what to measure: leave out lengths, patterns, caches, batch sizes and baseline"
        )
    lengths = tuple(length or LENGTHS["cuda" if kind == "cuda" else "cpu"]) if plan is None else ()
    options = BenchOptions(
        source=source,
        shape=shape or ("30b" if kind == "cuda" else "tiny"),
        experts=experts,
        layers=layers,
        narrow=narrow,
        lengths=lengths,
        patterns=tuple(dict.fromkeys(pattern or (["own"] if source else ["all full", "1/2", "1/4"])))
        if plan is None
        else (),
        input=input or ("random" if source else "drift"),
        ways=ways,
        decode_steps=decode_steps,
        batch_sizes=tuple(batch_size or ()),
        parts=breakdown,
        peer_lengths=tuple(baseline_length or (min(lengths),)) if baseline or baseline_length else (),
        repeats=repeats,
        device=kind if device is None else device,
        dtype=dtype,
        revision=revision,
        token=token,
        rows=tuple(read_plan(plan)) if plan is not None else (),
    )
    document = run_bench(options, output, resume, overwrite, _silent if as_json else _line)
    for warning in document.get("warnings", []):
        tell(f"warning: {warning}", err=True)
    drawn = _draw(document, output, as_json) if pictures else []
    if as_json:
        print_json(document)
        return
    _print_tables(document)
    tell(f"{output}: " + ", ".join(["bench.json", *drawn]))


def _silent(row: Row, found: dict[str, Any], resumed: bool) -> None:
    """Report nothing."""


def _line(row: Row, found: dict[str, Any], resumed: bool) -> None:
    """One row as a line on stderr, as soon as it is known."""
    shown = " ".join(
        f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float) and name != "took_seconds"
    )
    shown = found.get("out_of_memory") or shown or f"took {found['took_seconds']} s"
    way = (
        f" {row.way}" * bool(row.way)
        + f" {row.input}" * bool(row.input)
        + f" batch {row.batch or 'most'}" * (row.kind == "full cache")
    )
    mark = " (from the journal)" * resumed
    tell(f"{row.model} {row.kind}{way} {row.tokens:,} {row.pattern}: {shown}{mark}", err=True)


def _draw(document: dict[str, Any], output: Path, as_json: bool) -> list[str]:
    """Pictures and page; the names of the files written."""
    try:
        from .speed_figures import draw_parts, draw_speed_ups
    except ImportError:
        if not as_json:
            tell("no pictures: pip install matplotlib", err=True)
        return []
    from .speed_report import REPORT_FILE, write_report

    pictures = [
        (title, output / name)
        for title, name, draw in (
            ("Speed-up by context length", "speedup.png", draw_speed_ups),
            ("Where the time goes", "parts.png", draw_parts),
        )
        if draw(document, output / name)
    ]
    write_report(document, pictures, output / REPORT_FILE)
    return [path.name for _, path in pictures] + [REPORT_FILE]


def _print_tables(document: dict[str, Any]) -> None:
    from rich.table import Table

    from ...runs.pages.terminal import terminal
    from .speed_report import tables

    console = terminal()
    for title, columns, lines in tables(document):
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(columns):
            table.add_column(name, justify="left" if i == 0 else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
