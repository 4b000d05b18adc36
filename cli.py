"""The `indexcache` command line. Exit codes: 0 done, 1 a check or the work failed, 2 bad usage.

Only arguments, calls and printing live here; what takes long to import is imported by the verbs themselves.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from .benchmarks.bench.command import bench as bench_verb
from .conversion.io.terminal_text import guard_terminal, printable, tell
from .distillation.command import distill as distill_verb
from .evaluation.command import evaluate as evaluate_verb
from .pattern_search.command import search as search_verb
from .runs.arguments import LARGEST_SEED, AsJson, Revision, Token, finite

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .conversion.publish.hub_contents import HubContents


class _Verbs(TyperGroup):
    """The verbs, and what is the same for all: no argument holds a NUL, which no path and no name can hold."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for argument in args:
            if "\0" in argument:
                raise typer.BadParameter(f"{argument!r} holds a NUL character: give a path or a value without it")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="indexcache",
    cls=_Verbs,
    help="IndexCache for Transformers: share the lightning indexer of DeepSeek Sparse Attention models across layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# A value of a damaged file may be megabytes long: a message shows its beginning and its end.
_LONGEST_MESSAGE = 4000


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


def _fail(message: str, code: int = 1) -> NoReturn:
    """Print an error for a person, without a traceback, and leave."""
    from rich.text import Text

    from .conversion.io.hub_requests import redact
    from .runs.pages.terminal import terminal

    shown = printable(redact(message))
    if len(shown) > _LONGEST_MESSAGE:
        end, left_out = _LONGEST_MESSAGE // 8, len(shown) - _LONGEST_MESSAGE
        shown = f"{shown[: _LONGEST_MESSAGE - end]} ... ({left_out:,} characters) ... {shown[-end:]}"
    terminal(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), shown))
    raise typer.Exit(code)


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    from .conversion.io.sources import ConversionError
    from .distillation.errors import DistillationDiverged, DistillationError
    from .runs.errors import EvaluationError

    try:
        yield
    except ConversionError as error:
        _fail(str(error))
    except DistillationDiverged as error:
        _fail(str(error))
    except (EvaluationError, DistillationError) as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except ImportError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; unfinished work goes on with --resume, where the verb has it", 130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        reason = next(iter(str(error).splitlines()), "")
        _fail(f"the device's memory is too small: {reason}; give shorter windows, smaller batches or more devices")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _print(drawing: RenderableType) -> None:
    from .runs.pages.terminal import terminal

    terminal().print(drawing)


@app.callback(invoke_without_command=True)
def _about(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib import metadata

        tell(metadata.version("indexcache"))
        raise typer.Exit


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="DSA or IndexCache checkpoint: a folder, or a Hub id (org/name).")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    pattern: Annotated[str | None, typer.Option(help="One letter a layer: F runs its indexer, S shares.")] = None,
    pattern_file: Annotated[Path | None, typer.Option(help="JSON that the pattern search wrote.")] = None,
    keep: Annotated[
        str | None, typer.Option(help="Evenly spaced full layers: 1/4, 0.25 or a count. Chooses in a pattern file.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="auto keeps every byte (fp8 too); others cast and dequantise."),
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
        _fail("--private belongs to --push-to-hub ID", 2)
    if dry_run and (resume or push_to_hub):
        _fail("--dry-run writes nothing: drop --resume and --push-to-hub", 2)
    with _errors_as_messages():
        from .conversion.check.drawing import draw_plan, human_bytes, plan_summary
        from .conversion.convert.convert import ConvertOptions, plan_conversion
        from .conversion.convert.convert import convert as run_conversion
        from .conversion.convert.pattern_file import choose_pattern
        from .conversion.io.checkpoint import read_checkpoint
        from .conversion.io.open_checkpoint import check_layer_count, open_source
        from .conversion.io.sources import ConversionError
        from .conversion.publish.hub import push_folder

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
            _fail(str(error), 2)
        plan = plan_conversion(checkpoint, options)
        if dry_run:
            _print_json(plan_summary(plan)) if as_json else _print(draw_plan(plan))
            return
        with _progress(not as_json, plan.nbytes) as advance:
            done = run_conversion(
                opened, output, options, plan=plan, on_shard=lambda shard, how: advance(shard.file, shard.nbytes)
            )
        url = None
        if push_to_hub:
            url = push_folder(output, push_to_hub, private=private or None, token=token, announce=_announcer(as_json))
        if as_json:
            summary = {**plan_summary(plan), "warnings": list(done.warnings), "how": done.how}
            _print_json({"output": str(output), **summary, "url": url})
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

    from .conversion.io.sources import ConversionError

    if size is None:
        return None
    try:
        found = int(convert_file_size_to_int(size))
    except ValueError as error:
        raise ConversionError(f"--max-shard-size {size!r} is no size: write 5GB, 500MB or 2GiB") from error
    if found < 1:
        raise ConversionError(f"--max-shard-size must be positive (got {size!r})")
    return found


@contextmanager
def _progress(wanted: bool, total: int) -> Iterator[Any]:
    """Yields a function that notes a finished shard; draws a bar on stderr when that is a terminal."""
    if not wanted or not sys.stderr.isatty():
        with nullcontext():
            yield lambda file, nbytes: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from .runs.pages.terminal import terminal

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal(stderr=True)) as bar:
        task = bar.add_task("shards", total=total)
        yield lambda file, nbytes: bar.update(task, advance=nbytes, description=file)


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="The checkpoint that was converted: a folder or Hub id.")],
    converted: Annotated[str, typer.Argument(help="The IndexCache checkpoint: a folder or Hub id.")],
    logits: Annotated[bool, typer.Option(help="Also run both models, if they fit in memory.")] = True,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Check that a converted checkpoint holds its source's tensors byte for byte and gives the same logits."""
    with _errors_as_messages():
        import dataclasses

        from .conversion.check.drawing import draw_verification
        from .conversion.check.verify import verify as run_verification
        from .conversion.io.open_checkpoint import open_source

        result = run_verification(
            open_source(source, token=token), open_source(converted, token=token), compare_logits=logits
        )
        found = {"ok": result.ok, "verdict": result.verdict, **dataclasses.asdict(result)}
        _print_json(found) if as_json else _print(draw_verification(result))
        if not result.ok:
            raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(help="A DSA or IndexCache checkpoint: a folder or Hub id; or a search's patterns.json.")
    ],
    overlap: Annotated[
        str | None, typer.Option(metavar="DATA", help="Run text or windows: what the selections have in common.")
    ] = None,
    overlap_picture: Annotated[Path | None, typer.Option(help="With --overlap: write the heatmap as PNG.")] = None,
    seqlen: Annotated[int | None, typer.Option(min=1, help="With --overlap: tokens a window.")] = None,
    nsamples: Annotated[int, typer.Option(min=1, help="With --overlap: windows.")] = 4,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show a checkpoint's pattern, its indexers layer by layer, and its cache bytes a token; or a search's result."""
    with _errors_as_messages():
        if Path(path).is_file():
            from .pattern_search.drawing import draw_result
            from .pattern_search.result import read_result

            if overlap is not None or overlap_picture is not None:
                _fail("--overlap needs a checkpoint, and this is a file of patterns", 2)
            result = read_result(Path(path))
            _print_json(result) if as_json else _print(draw_result(result))
            return
        from .conversion.check.describe import describe
        from .conversion.check.drawing import draw_description
        from .conversion.io.open_checkpoint import open_source

        description = describe(open_source(path, revision=revision, token=token))
        heatmap = None
        if overlap is not None:
            from .evaluation.measure_overlap import draw_heatmap, measure_overlap

            found = measure_overlap(path, overlap, seqlen, nsamples, overlap_picture, revision=revision, token=token)
            description["overlap"], heatmap = found, draw_heatmap(found["layers"], found["matrix"])
        _print_json(description) if as_json else _print(draw_description(description))
        if heatmap is not None and not as_json:
            _print(heatmap)


@app.command()
@wraps(search_verb)
def search(*args: Any, **kwargs: Any) -> None:
    """Arguments, work and output: `pattern_search/command.py`."""
    with _errors_as_messages():
        search_verb(*args, **kwargs)


@app.command(name="eval")
@wraps(evaluate_verb)
def evaluate(*args: Any, **kwargs: Any) -> None:
    """Arguments, work and output: `evaluation/command.py`."""
    with _errors_as_messages():
        evaluate_verb(*args, **kwargs)


@app.command()
@wraps(distill_verb)
def distill(*args: Any, **kwargs: Any) -> None:
    """Arguments, work and output: `distillation/command.py`."""
    with _errors_as_messages():
        distill_verb(*args, **kwargs)


@app.command()
@wraps(bench_verb)
def bench(*args: Any, **kwargs: Any) -> None:
    """Arguments, work and output: `benchmarks/bench/command.py`."""
    with _errors_as_messages():
        bench_verb(*args, **kwargs)


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="A DSA or IndexCache checkpoint: a folder or Hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from; - reads stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Sample; by default the likeliest token is taken.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, callback=finite, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, callback=finite, help="With --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="With --sample.")] = 0,
    pattern: Annotated[
        str | None, typer.Option(help="Share pattern to run the checkpoint with, in place of its own.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...; the GPU where there is one.")] = None,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Generate text, printed as it comes."""
    with _errors_as_messages():
        import torch
        from transformers import set_seed

        from .configuration.share_pattern import SharePattern
        from .conversion.io.load_source import load_source
        from .runs.loading import Placement, open_model
        from .runs.pages.terminal import text_streamer
        from .runs.windows.tokenizer import load_tokenizer

        try:
            wanted = None if pattern is None else SharePattern.parse(pattern)
        except ValueError as error:
            _fail(f"--pattern: {error}", 2)
        text = _prompt(prompt)
        opened = open_model(path, Placement(device=device, revision=revision, token=token), wanted)
        tokenizer: Any = load_tokenizer(opened.source)
        if tokenizer is None:
            _fail(f"{path} has no tokenizer: generate needs one")
        encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        model: Any = load_source(opened, dtype="auto")
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        inputs = encoded.to(model.device)
        set_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if sample else {"do_sample": False}
        model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=text_streamer(tokenizer), **sampling)


def _prompt(prompt: str) -> str:
    """The text to go on from; `-` reads stdin."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if prompt == "-" else prompt
        # Where an argument is no UTF-8, Python makes half surrogates of its bytes.
        text.encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        _fail(f"the prompt is no UTF-8 text: {error}", 2)
    if not text:
        _fail("the prompt is empty: give some text", 2)
    return text


@app.command()
def push(
    path: Annotated[Path, typer.Argument(help="A finished checkpoint folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="Hub repository, org/name; made when absent.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="For a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made when absent.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show what would be sent, send nothing.")] = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Push a finished checkpoint to the Hub: what belongs to it, and nothing else of its folder.

    What is sent and what stays is shown first. After an interrupted push, run it again.
    """
    with _errors_as_messages():
        from .conversion.publish.hub import check_contents, push_folder

        shown: list[HubContents] = []
        announce, url = _announcer(as_json, shown), None
        if dry_run:
            announce(check_contents(path, token))
        else:
            url = push_folder(
                path,
                repo_id,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message,
                announce=announce,
            )
        if as_json:
            _print_json({"url": url, "files": shown[0].files, "left": shown[0].left})
        else:
            tell(f"pushed: {url}" if url else f"nothing sent to {repo_id}: --dry-run")
            if url:
                commit = url.rpartition("/")[2]
                tell(f'pinned: from_pretrained("{repo_id}", revision="{commit}", trust_remote_code=True)')


def _announcer(as_json: bool, shown: list[HubContents] | None = None) -> Callable[[HubContents], None]:
    """Shows what a push is about to send, unless --json does so at the end, and notes it in `shown`."""
    from .conversion.check.drawing import contents_text

    def announce(contents: HubContents) -> None:
        if shown is not None:
            shown.append(contents)
        if not as_json:
            tell(contents_text(contents))

    return announce


@app.command()
def refresh(
    path: Annotated[str, typer.Argument(metavar="PATH|ID", help="An IndexCache checkpoint: a folder or a Hub id.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change and write nothing.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch of a Hub repository; main by default.")] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Put this release's code into a checkpoint that an older one wrote.

    The code files and the version in config.json change; weights, card and all settings stay byte for byte.
    """
    with _errors_as_messages():
        from .conversion.check.drawing import refresh_text
        from .conversion.io.open_checkpoint import open_source
        from .conversion.publish.refresh import plan_refresh
        from .conversion.publish.refresh import refresh as run_refresh

        source = open_source(path, revision=revision, token=token)
        plan = plan_refresh(source)
        url = None if dry_run else run_refresh(source, plan, revision=revision, token=token)
        if as_json:
            _print_json({**plan.summary(), "dry_run": dry_run, "url": url})
            return
        tell(refresh_text(plan, dry_run))
        if url:
            tell(f"pushed: {url}")


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="An IndexCache checkpoint folder, or a search's patterns.json.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; for patterns.json the file of config fields.")],
    to: Annotated[Literal["vllm", "sglang", "trtllm", "transformers", "megatron"], typer.Option(help="The engine.")],
    keep: Annotated[str | None, typer.Option(help="Chooses in patterns.json: 1/4, 0.25 or a count.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the same weights with the config spelled for another engine; of patterns.json, the config fields alone."""
    with _errors_as_messages():
        from .conversion.publish.export import export as run_export
        from .conversion.publish.export import export_pattern

        if path.is_file():
            fields = export_pattern(path, output, to, keep)
            found = {"output": str(output), "engine": to, "fields": fields}
            _print_json(found) if as_json else tell(f"{output}: config fields for {to}")
            return
        if keep is not None:
            _fail("--keep chooses in a patterns.json: a checkpoint's own pattern is exported as it is", 2)
        written = run_export(path, output, to)
        _print_json({"output": str(written), "engine": to}) if as_json else tell(f"{written}: for {to}")


@app.command(name="warm-up")
def warm_up(
    path: Annotated[str, typer.Argument(help="A DSA or IndexCache checkpoint: a folder or Hub id.")],
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16"], typer.Option(help="Of the weights; auto: what the config says.")
    ] = "auto",
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest prompt to compile for.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Processes; one a processor.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Architecture to compile for without a GPU, e.g. sm_90; the GPU here.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Compile a model's kernels into Triton's cache (TRITON_CACHE_DIR), so that no first token waits for them.

    For images and clusters: a cache that was filled without a GPU serves one, with the same Triton and the same
    release of indexcache.
    """
    with _errors_as_messages():
        from .conversion.publish.warm_up import warm_up as run_warm_up

        done = run_warm_up(
            path, dtype=dtype, max_length=max_length, jobs=jobs, target=target, revision=revision, token=token
        )
        found = {**done._asdict(), "target": done.target._asdict()}
        if as_json:
            _print_json(found)
        else:
            kind = f"{done.target.backend} {done.target.arch}"
            new = f"{done.compiled} of them new, in {done.seconds:.1f} s"
            tell(f"{done.cache}: {done.variants} kernels for {kind}, {new}")
            for name, error in done.failed.items():
                tell(f"{name} does not compile: {error}", err=True)
        if done.failed:
            raise typer.Exit(1)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show the versions and devices that matter for a bug report."""
    import platform

    from .conversion.convert.installed_versions import installed_versions

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
        _print_json(found)
        return
    for name, value in found.items():
        tell(f"{name:<16} {value if value not in (None, []) else 'none'}")


if __name__ == "__main__":
    main()
