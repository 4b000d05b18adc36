"""The arguments of `indexcache search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

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

_how = in_panel("How to search")


def search(
    source: Annotated[str, typer.Argument(help="DSA or IndexCache checkpoint: a folder, or a Hub id (org/name).")],
    data: Annotated[str, data_option(help=DATA_HELP)],
    output: Annotated[Path, typer.Option(help="Folder for patterns.json, journal, pictures and report.")] = Path(
        "indexcache_search"
    ),
    keep: Annotated[
        list[str] | None, typer.Option(help="Full layers to keep: 1/4, 0.25 or a count; repeat. Default: 1/2 1/4 1/8.")
    ] = None,
    tolerance: Annotated[
        str | None,
        typer.Option(help="Choose the fewest full layers whose held-out loss rises by no more than, e.g., 0.5%."),
    ] = None,
    least_recall: Annotated[
        str,
        typer.Option(
            help="What --tolerance chooses must recall of facts far back, or this share of what the source does; "
            "0 looks at the loss alone."
        ),
    ] = "90%",
    algorithm: Annotated[
        Literal["lazy", "greedy"], _how(help="lazy: lazy greedy with refinement. greedy: the paper's Algorithm 1.")
    ] = "lazy",
    objective: Annotated[
        Literal["kl", "far-kl", "lm"] | None,
        _how(
            help="kl: divergence from a teacher (lazy). far-kl: the same, tokens that need far context weighted "
            "higher. lm: language-model loss (greedy)."
        ),
    ] = None,
    teacher: Annotated[
        Literal["auto", "dense", "source"],
        _how(help="For kl: dense attention, the source as it is, or the better of the two on the first windows."),
    ] = "auto",
    blocks: Annotated[int, _how(min=1, help="For greedy: pipeline blocks.")] = 1,
    path_rounds: Annotated[
        int,
        _how(
            min=1,
            max=5,
            help="For lazy: share of windows that decides its steps; 1/16, 1/8, 1/4, 1/2, all for 1 to 5.",
        ),
    ] = 3,
    refine: Annotated[int, _how(min=0, help="Most refinement moves for each --keep.")] = 2,
    refine_by: Annotated[Literal["lm", "objective"], _how(help="What refinement lowers.")] = "objective",
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Patterns to compare with: uniform, similarity, none; repeat. Default: uniform."),
    ] = None,
    curve: Annotated[bool, typer.Option(help="Evaluate every number of full layers on the held-out windows.")] = True,
    held_out: Annotated[
        str | None, data_option(help="Data to evaluate patterns on. Default: split off from --data.")
    ] = None,
    seqlen: Seqlen = None,
    nsamples: Annotated[int | None, data_option(min=1, help="Calibration windows. Default: 16.")] = None,
    seed: Annotated[int, data_option(help="For the choice of windows.")] = 0,
    data_split: DataSplit = "train",
    text_field: TextField = "text",
    batch_size: Annotated[int, run_option(min=1, help="Windows per forward pass.")] = 1,
    resume: Annotated[bool, run_option("--resume", help="Continue from the journal.")] = False,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    parallel: Annotated[
        Literal["windows", "tensor"], run_option(help="What is split over the processes of torchrun.")
    ] = "windows",
    cache_memory: Annotated[
        str | None, run_option(help="Memory for cached hidden states, e.g. 20GB. Default: a quarter of what is free.")
    ] = None,
    cache_on: Annotated[Literal["device", "host"], run_option(help="Where cached hidden states are kept.")] = "device",
    stream: Stream = False,
    pictures: Pictures = True,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Search which layers can share their indexer's selection, without training.

    Writes patterns.json, which `convert --pattern-file` takes with `--keep`. Every evaluation is journaled: after an
    interruption, repeat the command with --resume. Under torchrun or `accelerate launch` the processes share the
    windows.
    """
    from ..runs.loading import Placement
    from ..runs.monitor import Monitor, TerminalMonitor
    from ..runs.processes import Processes
    from ..runs.windows.window_sources import Sampling
    from .run import SearchRun, run_search
    from .search import DEFAULT_KEEP, SearchOptions

    options = SearchOptions(
        keep=tuple(keep or DEFAULT_KEEP),
        tolerance=_share(tolerance, "--tolerance"),
        least_recall=_share(least_recall, "--least-recall") or 0.0,
        algorithm=algorithm,
        objective=objective,
        teacher=teacher,
        blocks=blocks,
        path_rounds=path_rounds,
        refine_passes=refine,
        refine_by=refine_by,
        baselines=_baselines(baseline),
        curve=curve,
        batch_size=batch_size,
    )
    run = SearchRun(
        data,
        output,
        held_out,
        Sampling(seqlen, nsamples, seed, data_split, text_field),
        resume,
        overwrite,
        Placement(dtype, device, device_map, False, revision, token),
        parallel,
        cache_memory,
        cache_on,
        stream,
    )
    document = run_search(source, run, options, Monitor() if as_json else TerminalMonitor())
    if not Processes.from_environment(parallel).is_first:
        return
    if pictures:
        draw_page(lambda: _draw(document, output), as_json)
    if as_json:
        print_json(document)
        return
    from .drawing import draw_summary
    from .result import PATTERNS_FILE

    which = "" if "keep" in document else f" --keep {document['asked_for'][-1]}"
    following = f"next: indexcache convert {source} OUTPUT --pattern-file {output / PATTERNS_FILE}{which}"
    show_result(draw_summary(document), output, PATTERNS_FILE, following)


def _share(text: str | None, option: str) -> float | None:
    """`0.5%` or `0.005` as 0.005."""
    from ..runs.errors import RunError

    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise RunError(f"{option} {text!r} is no share: write 0.5% or 0.005") from error
    if not 0 <= value < 1:
        raise RunError(f"{option} must lie in 0% .. 100% (got {text})")
    return value


def _baselines(names: list[str] | None) -> tuple[str, ...]:
    from ..runs.errors import RunError

    wanted = tuple(dict.fromkeys(names or ["uniform"]))
    if unknown := set(wanted) - {"uniform", "similarity", "none"}:
        raise RunError(f"--baseline must be uniform, similarity or none (got {', '.join(sorted(unknown))})")
    return tuple(name for name in wanted if name != "none")


def _draw(document: dict[str, Any], output: Path) -> None:
    from .report import write_report

    write_report(document, output)
