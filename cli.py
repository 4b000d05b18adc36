"""The `indexcache` command line. Exit codes: 0 done, 1 a check or the work failed, 2 bad usage.

A verb has its arguments, calls and printing in the `command.py` of the folder that does its work; `generate` and `env`
have theirs here. What takes long to import is imported by the verbs themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .benchmarks.bench.command import RENAMED as RENAMED_IN_BENCH
from .benchmarks.bench.command import bench
from .conversion.check.command import inspect, verify
from .conversion.convert.command import convert
from .conversion.io.terminal_text import guard_terminal, tell
from .conversion.publish.command import export, push, refresh, warm_up
from .distillation.command import RENAMED as RENAMED_IN_DISTILL
from .distillation.command import distill
from .evaluation.command import evaluate
from .pattern_search.command import search
from .planning.command import plan
from .runs.arguments import LARGEST_SEED, AsJson, Revision, Token, finite, takes_old_names
from .runs.command_line import fail, print_json, settings_of, show


class _Verbs(TyperGroup):
    """The verbs, and what is the same for all: no argument holds a NUL, and none is empty but a prompt.

    No path and no name can hold a NUL; an empty path would be the current folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for argument in args:
            if "\0" in argument:
                raise typer.BadParameter(f"{argument!r} holds a NUL character: give a path or a value without it")
            is_empty = not argument or (argument.startswith("--") and argument.endswith("="))
            if is_empty and args[0] != "generate":
                raise typer.BadParameter(f"{argument!r} gives an empty value: give a path or a value")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="indexcache",
    cls=_Verbs,
    help="IndexCache for Transformers: share the lightning indexer of DeepSeek Sparse Attention models across layers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the `indexcache` command.

    What nobody foresaw ends in one line as well, with exit code 1; its traceback goes to a file that the line names,
    or to the terminal where INDEXCACHE_TRACEBACK is set.
    """
    guard_terminal()
    try:
        app()
    except Exception as error:
        if os.environ.get("INDEXCACHE_TRACEBACK"):
            raise
        tell(f"error: {_unforeseen(error)}", err=True)
        raise SystemExit(1) from None


def _unforeseen(error: Exception) -> str:
    import tempfile
    import traceback

    trace = "".join(traceback.format_exception(error))
    message = next(iter(str(error).splitlines()), "") or "without a message"
    try:
        handle, path = tempfile.mkstemp(prefix="indexcache_", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(trace)
    except OSError:
        return f"unexpected {type(error).__name__}: {message}\n{trace}"
    return (
        f"unexpected {type(error).__name__}: {message} - where it arose is written in {path}; please report it with "
        "that file and what `indexcache env` prints"
    )


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    from .conversion.io.sources import ConversionError
    from .distillation.errors import DistillationDiverged
    from .runs.errors import RunError

    try:
        yield
    except ConversionError as error:
        fail(str(error))
    except DistillationDiverged as error:
        fail(str(error))
    except RunError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except ImportError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; unfinished work goes on with --resume, where the verb has it", 130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        reason = next(iter(str(error).splitlines()), "")
        fail(f"the device's memory is too small: {reason}; give shorter windows, smaller batches or more devices")


@app.callback(invoke_without_command=True)
def _about(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with a table per verb: its options' values, where not given here.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib import metadata

        tell(metadata.version("indexcache"))
        raise typer.Exit
    if config is not None:
        group: Any = ctx.command
        ctx.default_map = dict(settings_of(config, group.commands))


def generate(
    path: Annotated[str, typer.Argument(help="A DSA or IndexCache checkpoint: a folder or Hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Sample; by default decoding is greedy.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, callback=finite, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, callback=finite, help="With --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="With --sample.")] = 0,
    pattern: Annotated[str | None, typer.Option(help="Share pattern to run in place of the checkpoint's own.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu, ... Default: the GPU where there is one.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Generate text, printed as it comes."""
    import torch
    from transformers import set_seed

    from .configuration.share_pattern import SharePattern
    from .conversion.io.load_source import load_source
    from .runs.generation_settings import check_generation_settings
    from .runs.loading import Placement, open_model
    from .runs.pages.terminal import text_streamer
    from .runs.windows.tokenizer import load_tokenizer

    try:
        wanted = None if pattern is None else SharePattern.parse(pattern)
    except ValueError as error:
        fail(f"--pattern: {error}", 2)
    text = _prompt(prompt)
    opened = open_model(path, Placement(device=device, revision=revision, token=token), wanted)
    tokenizer: Any = load_tokenizer(opened.source)
    if tokenizer is None:
        fail(f"{path} has no tokenizer: generate needs one")
    check_generation_settings(opened, sample, tokenizer)
    encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    model: Any = load_source(opened, dtype="auto")
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    inputs = encoded.to(model.device)
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if sample else {"do_sample": False}
    streamer = text_streamer(tokenizer)
    model.generate(**inputs, max_new_tokens=max_new_tokens, tokenizer=tokenizer, streamer=streamer, **sampling)


def _prompt(prompt: str) -> str:
    """The text to go on from; `-` reads stdin."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if prompt == "-" else prompt
        # Where an argument is no UTF-8, Python makes half surrogates of its bytes.
        text.encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        fail(f"the prompt is no UTF-8 text: {error}", 2)
    if not text:
        fail("the prompt is empty: give some text", 2)
    return text


def env(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Show which backend runs each operation, and why not a faster one.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(help="With --kernels: on a GPU of this architecture, e.g. sm_90. Default: this one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the versions and devices that matter for a bug report."""
    import platform

    from .conversion.convert.installed_versions import installed_versions

    if target is not None and not kernels:
        fail("--target goes with --kernels", 2)
    chosen = _kernel_choices(target) if kernels else []
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    found |= installed_versions(
        "indexcache", "torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "triton"
    )
    try:
        import torch

        found["cuda"] = torch.version.cuda
        found["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except ImportError as error:
        found["torch import"] = str(error)
    if as_json:
        print_json(found | ({"kernels": chosen} if kernels else {}))
        return
    for name, value in found.items():
        tell(f"{name:<16} {value if value not in (None, []) else 'none'}")
    if kernels:
        from .conversion.check.drawing import draw_choices

        show(draw_choices(chosen, target or "this machine"))


def _kernel_choices(target: str | None) -> list[dict[str, Any]]:
    """What runs for each operation of the kernels, on an architecture, the first GPU here, or a CPU."""
    import torch

    from .kernels.common.backend_listing import choices
    from .kernels.common.device_target import TARGETS

    if target is not None and target not in TARGETS:
        fail(f"--target {target!r} is none of {', '.join(TARGETS)}", 2)
    on_gpu = target is not None or torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    return [choice._asdict() for choice in choices(device, TARGETS[target] if target else None)]


# In the order in which --help shows them.
_VERBS: dict[str, Callable[..., None]] = {
    "convert": convert,
    "verify": verify,
    "inspect": inspect,
    "plan": plan,
    "search": search,
    "eval": evaluate,
    "distill": distill,
    "bench": bench,
    "generate": generate,
    "push": push,
    "refresh": refresh,
    "export": export,
    "warm-up": warm_up,
    "env": env,
}


def _with_errors_as_messages(work: Callable[..., None]) -> Callable[..., None]:
    @wraps(work)
    def verb(*args: Any, **kwargs: Any) -> None:
        with _errors_as_messages():
            work(*args, **kwargs)

    return verb


_RENAMED = {"bench": RENAMED_IN_BENCH, "distill": RENAMED_IN_DISTILL}

for _name, _work in _VERBS.items():
    app.command(name=_name, cls=takes_old_names(_RENAMED.get(_name, {})))(_with_errors_as_messages(_work))


if __name__ == "__main__":
    main()
