"""The arguments of `indexcache push`, `refresh`, `export` and `warm-up`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ...runs.arguments import AsJson, Revision, Token
from ...runs.command_line import fail, print_json
from ..io.terminal_text import tell

if TYPE_CHECKING:
    from .hub_contents import HubContents


def push(
    path: Annotated[Path, typer.Argument(help="A finished checkpoint folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="Hub repository, org/name; made when absent.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="For a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made when absent.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose it as a pull request to a repository that exists.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show what would be sent, send nothing.")] = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Push a finished checkpoint to the Hub: what belongs to it, and nothing else of its folder.

    What is sent and what stays is shown first. After an interrupted push, run it again.
    """
    from .hub import check_contents, push_folder

    if create_pr and private is not None:
        fail("--create-pr proposes to a repository that exists: --private and --public are for a new one", 2)
    shown: list[HubContents] = []
    announce, url = announcer(as_json, shown), None
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
            create_pr=create_pr,
            announce=announce,
        )
    if as_json:
        print_json({"url": url, "files": shown[0].files, "left": shown[0].left})
    else:
        done = "proposed" if create_pr else "pushed"
        tell(f"{done}: {url}" if url else f"nothing sent to {repo_id}: --dry-run")
        if url and not create_pr:
            commit = url.rpartition("/")[2]
            tell(f'pinned: from_pretrained("{repo_id}", revision="{commit}", trust_remote_code=True)')


def announcer(as_json: bool, shown: list[HubContents] | None = None) -> Callable[[HubContents], None]:
    """Shows what a push is about to send, unless --json does so at the end, and notes it in `shown`."""
    from ..check.drawing import contents_text

    def announce(contents: HubContents) -> None:
        if shown is not None:
            shown.append(contents)
        if not as_json:
            tell(contents_text(contents))

    return announce


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
    from ..check.drawing import refresh_text
    from ..io.open_checkpoint import open_source
    from .refresh import plan_refresh
    from .refresh import refresh as run_refresh

    source = open_source(path, revision=revision, token=token)
    plan = plan_refresh(source)
    url = None if dry_run else run_refresh(source, plan, revision=revision, token=token)
    if as_json:
        print_json({**plan.summary(), "dry_run": dry_run, "url": url})
        return
    tell(refresh_text(plan, dry_run))
    if url:
        tell(f"pushed: {url}")


def export(
    path: Annotated[Path, typer.Argument(help="An IndexCache checkpoint folder, or a search's patterns.json.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; for patterns.json the file of config fields.")],
    to: Annotated[
        Literal["vllm", "sglang", "trtllm", "transformers", "megatron"], typer.Option(help="The inference engine.")
    ],
    keep: Annotated[str | None, typer.Option(help="Which pattern of patterns.json: 1/4, 0.25 or a count.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the same weights with the config spelled for another engine; of patterns.json, the config fields alone."""
    from .export import export as run_export
    from .export import export_pattern

    if path.is_file():
        fields = export_pattern(path, output, to, keep)
        found = {"output": str(output), "engine": to, "fields": fields}
        print_json(found) if as_json else tell(f"{output}: config fields for {to}")
        return
    if keep is not None:
        fail("--keep chooses in a patterns.json: a checkpoint's own pattern is exported as it is", 2)
    written = run_export(path, output, to)
    print_json({"output": str(written), "engine": to}) if as_json else tell(f"{written}: for {to}")


def warm_up(
    path: Annotated[str, typer.Argument(help="A DSA or IndexCache checkpoint: a folder or Hub id.")],
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16"], typer.Option(help="Of the weights; auto: what the config says.")
    ] = "auto",
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest prompt to compile for, in tokens.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes. Default: one per CPU core.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Architecture to compile for without a GPU, e.g. sm_90. Default: the GPU here.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Compile a model's kernels into Triton's cache (TRITON_CACHE_DIR), so that no first token waits for them.

    For images and clusters: a cache that was filled without a GPU serves one, with the same Triton and the same
    release of indexcache.
    """
    from .warm_up import warm_up as run_warm_up

    done = run_warm_up(
        path, dtype=dtype, max_length=max_length, jobs=jobs, target=target, revision=revision, token=token
    )
    found = {**done._asdict(), "target": done.target._asdict()}
    if as_json:
        print_json(found)
    else:
        kind = f"{done.target.backend} {done.target.arch}"
        new = f"{done.compiled} of them new, in {done.seconds:.1f} s"
        tell(f"{done.cache}: {done.variants} kernels for {kind}, {new}")
        for name, error in done.failed.items():
            tell(f"{name} does not compile: {error}", err=True)
    if done.failed:
        raise typer.Exit(1)
