"""The arguments of `indexcache plan`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ..runs.arguments import AsJson, Revision, Token, finite
from ..runs.command_line import fail, print_json, show


def plan(
    path: Annotated[str, typer.Argument(help="A DSA or IndexCache checkpoint: a folder or Hub id.")],
    gpus: Annotated[int, typer.Option(min=1, max=4096, help="GPUs of one host.")] = 8,
    gpu: Annotated[str, typer.Option(help="Their kind: h100, h200, b200, a100-80, l40s, rtx-pro-6000, ...")] = "h200",
    memory: Annotated[
        float | None, typer.Option(min=0.0, callback=finite, help="GiB of each, in place of the data sheet's.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer. Default: 131072, or the model's longest.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=65536, help="Sequences at a time.")] = 1,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="1/4, own, or letters, beside all F; repeat. Default: the checkpoint's own, and 1/4."),
    ] = None,
    cache: Annotated[Literal["static", "dynamic"], typer.Option(help="Cache of generate().")] = "static",
    prefill_chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each prompt at a time (prefill_chunk_size). Default: all.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Reckon what a checkpoint needs on given GPUs: memory, what fits, time, and the commands to run it.

    Reads the config and the headers of the weights alone. Exit code 1 if nothing fits.
    """
    from ..conversion.io.open_checkpoint import open_source
    from .drawing import draw_plan
    from .known_gpus import GIB, find_gpu
    from .plan import Wanted
    from .plan import plan as make_plan

    kind = find_gpu(gpu, memory)
    wanted = Wanted(gpus, kind, length, batch, tuple(pattern or ()), cache, prefill_chunk or 0)
    document = make_plan(open_source(path, revision=revision, token=token), wanted)
    print_json(document) if as_json else show(draw_plan(document))
    if not document["fits"]:
        fail(
            f"nothing fits {gpus} x {kind.name} of {kind.memory / GIB:.1f} GiB: fewer or shorter sequences, more "
            "GPUs, or larger ones"
        )
