"""The arguments of `indexcache convert`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ...runs.arguments import AsJson, Revision, Token
from ...runs.command_line import fail, print_json, show
from ...runs.monitor import Monitor, TerminalMonitor
from ..io.terminal_text import tell
from ..publish.command import announcer


def convert(
    source: Annotated[str, typer.Argument(help="DSA or IndexCache checkpoint: a folder, or a Hub id (org/name).")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    pattern: Annotated[str | None, typer.Option(help="One letter per layer: F runs its indexer, S shares.")] = None,
    pattern_file: Annotated[Path | None, typer.Option(help="JSON that the pattern search wrote.")] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Evenly spaced full layers: 1/4, 0.25 or a count. With --pattern-file: which of its patterns."
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="auto keeps every byte (fp8 too); the others cast and dequantise."),
    ] = "auto",
    max_shard_size: Annotated[str | None, typer.Option(help="Re-shard, e.g. 5GB. Default: as the source.")] = None,
    keep_shared_indexers: Annotated[bool, typer.Option(help="Keep indexer weights of shared layers.")] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy unchanged shards; by default they are linked to the source's files.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Finish an interrupted conversion.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="ID", help="Then push to this Hub repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new Hub repository private.")] = False,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Turn a DSA checkpoint into an IndexCache checkpoint.

    Unchanged shards are linked or passed through whole, so that a conversion takes little time and space. A linked
    shard is the source's own file under a second name: use --copy if the source's files will be edited in place.
    """
    if push_to_hub is None and private:
        fail("--private belongs to --push-to-hub ID", 2)
    if dry_run and (resume or push_to_hub):
        fail("--dry-run writes nothing: drop --resume and --push-to-hub", 2)
    from ..check.drawing import draw_plan, human_bytes, plan_summary
    from ..io.checkpoint import read_checkpoint
    from ..io.open_checkpoint import check_layer_count, open_source
    from ..io.sources import ConversionError
    from ..publish.hub import push_folder
    from .convert import ConvertOptions, plan_conversion
    from .convert import convert as run_conversion
    from .pattern_file import choose_pattern

    opened = open_source(source, revision=revision, token=token)
    checkpoint = read_checkpoint(opened)
    check_layer_count(checkpoint)
    try:
        options = ConvertOptions(
            choose_pattern(checkpoint.config, pattern, pattern_file, keep),
            dtype,
            _file_size(max_shard_size),
            keep_shared_indexers,
            copy,
            resume,
            overwrite,
            push_to_hub,
        )
    except ConversionError as error:
        fail(str(error), 2)
    plan = plan_conversion(checkpoint, options)
    if dry_run:
        print_json(plan_summary(plan)) if as_json else show(draw_plan(plan))
        return
    with TerminalMonitor() if not as_json and sys.stderr.isatty() else Monitor() as monitor:
        monitor.begin("shards", len(plan.shards))
        done = run_conversion(
            opened, output, options, plan=plan, on_shard=lambda shard, how: monitor.step(f"{shard.file} {how}")
        )
    url = None
    if push_to_hub:
        url = push_folder(output, push_to_hub, private=private or None, token=token, announce=announcer(as_json))
    if as_json:
        summary = {**plan_summary(plan), "warnings": list(done.warnings), "how": done.how}
        print_json({"output": str(output), **summary, "url": url})
        return
    ways = ", ".join(f"{list(done.how.values()).count(way)} {way}" for way in sorted(set(done.how.values())))
    dropped = human_bytes(sum(info.nbytes for info in plan.dropped))
    tell(f"{output}: pattern {plan.pattern}, shards: {ways}; {dropped} of indexer weights dropped")
    for note in done.warnings:
        tell(f"note: {note}")
    if url:
        tell(f"pushed: {url}")


def _file_size(size: str | None) -> int | None:
    from transformers.utils.hub import convert_file_size_to_int

    from ..io.sources import ConversionError

    if size is None:
        return None
    try:
        found = int(convert_file_size_to_int(size))
    except ValueError as error:
        raise ConversionError(f"--max-shard-size {size!r} is no size: write 5GB, 500MB or 2GiB") from error
    if found < 1:
        raise ConversionError(f"--max-shard-size must be positive (got {size!r})")
    return found
