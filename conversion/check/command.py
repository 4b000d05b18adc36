"""The arguments of `indexcache verify` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...runs.arguments import AsJson, Revision, Token
from ...runs.command_line import fail, print_json, show


def verify(
    source: Annotated[str, typer.Argument(help="The source checkpoint: a folder or Hub id.")],
    converted: Annotated[str, typer.Argument(help="The IndexCache checkpoint: a folder or Hub id.")],
    logits: Annotated[bool, typer.Option(help="Also compare logits, if both models fit in memory.")] = True,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Check that a converted checkpoint holds its source's tensors byte for byte and gives the same logits."""
    import dataclasses

    from ..io.open_checkpoint import open_source
    from .drawing import draw_verification
    from .verify import verify as run_verification

    result = run_verification(
        open_source(source, token=token), open_source(converted, token=token), compare_logits=logits
    )
    found = {"ok": result.ok, "verdict": result.verdict, **dataclasses.asdict(result)}
    print_json(found) if as_json else show(draw_verification(result))
    if not result.ok:
        raise typer.Exit(1)


def inspect(
    path: Annotated[
        str, typer.Argument(help="A DSA or IndexCache checkpoint: a folder or Hub id; or a search's patterns.json.")
    ],
    overlap: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Text or windows: measure how much the layers' selections overlap."),
    ] = None,
    overlap_picture: Annotated[Path | None, typer.Option(help="With --overlap: write the heatmap as PNG.")] = None,
    seqlen: Annotated[int | None, typer.Option(min=1, help="With --overlap: tokens per window.")] = None,
    nsamples: Annotated[int, typer.Option(min=1, help="With --overlap: number of windows.")] = 4,
    stream: Annotated[
        bool, typer.Option("--stream", help="With --overlap: take layers from the checkpoint one by one.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Do config, indexer weights and what each engine reads agree?")
    ] = False,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --check: an engine that must run it; may be repeated. Default: all."),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="With --check: also run the model on a text longer than top-k.")
    ] = False,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show a checkpoint's pattern, indexers layer by layer and cache bytes per token; or a search's result."""
    if (engine or probe) and not check:
        fail("--engine and --probe belong to --check", 2)
    if check:
        if overlap is not None or overlap_picture is not None:
            fail("--check and --overlap are two runs: give one of them", 2)
        _check(path, engine, probe, revision, token, as_json)
        return
    if Path(path).is_file():
        from ...pattern_search.drawing import draw_result
        from ...pattern_search.result import read_result

        if overlap is not None or overlap_picture is not None:
            fail("--overlap needs a checkpoint, and this is a file of patterns", 2)
        result = read_result(Path(path))
        print_json(result) if as_json else show(draw_result(result))
        return
    from ..io.open_checkpoint import open_source
    from .describe import describe
    from .drawing import draw_description

    description = describe(open_source(path, revision=revision, token=token))
    heatmap = None
    if overlap is not None:
        from ...evaluation.measure_overlap import draw_heatmap, measure_overlap

        found = measure_overlap(
            path, overlap, seqlen, nsamples, overlap_picture, revision=revision, token=token, stream=stream
        )
        description["overlap"], heatmap = found, draw_heatmap(found["layers"], found["matrix"])
    print_json(description) if as_json else show(draw_description(description))
    if heatmap is not None and not as_json:
        show(heatmap)


def _check(
    path: str, engines: list[str] | None, probe: bool, revision: str | None, token: str | None, as_json: bool
) -> None:
    from ..io.open_checkpoint import open_source
    from .doctor import diagnose
    from .doctor_findings import draw_diagnosis

    diagnosis = diagnose(open_source(path, revision=revision, token=token), engines or None, probe=probe)
    print_json(diagnosis.as_json()) if as_json else show(draw_diagnosis(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(1)
