"""What the verbs of the command line print: results, and errors for the person who can fix them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from ..conversion.io.terminal_text import printable, tell

if TYPE_CHECKING:
    from rich.console import RenderableType

# A value of a damaged file may be megabytes long: a message shows its beginning and its end.
_LONGEST_MESSAGE = 4000


def fail(message: str, code: int = 1) -> NoReturn:
    """Print an error for a person, without a traceback, and leave."""
    from rich.text import Text

    from ..conversion.io.hub_requests import redact
    from .pages.terminal import terminal

    shown = printable(redact(message))
    if len(shown) > _LONGEST_MESSAGE:
        end, left_out = _LONGEST_MESSAGE // 8, len(shown) - _LONGEST_MESSAGE
        shown = f"{shown[: _LONGEST_MESSAGE - end]} ... ({left_out:,} characters) ... {shown[-end:]}"
    terminal(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), shown))
    raise typer.Exit(code)


def settings_of(path: Path, verbs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A TOML file's settings, for `default_map` of the command line: a table per verb, a key per argument or option.

    Args:
        path: of the file. A key is an option's long name without its hyphens in front, or an argument's name.
        verbs: the verbs' commands by name.

    Raises:
        typer.BadParameter: no TOML, a verb or key that does not exist, or a table where a value belongs.
    """
    import tomllib

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} cannot be read as TOML: {error}") from error
    settings: dict[str, dict[str, Any]] = {}
    for verb, table in tables.items():
        if verb not in verbs or not isinstance(table, dict):
            raise typer.BadParameter(
                f"{path}: {verb!r} is no verb's table: write [search], say, and its options below"
            )
        names = {name: param.name for param in verbs[verb].params for name in _settable(param)}
        settings[verb] = {}
        for key, value in table.items():
            if key not in names or isinstance(value, dict):
                raise typer.BadParameter(
                    f"{path}: {verb} has no option {key!r}{_nearest(key, names)}: see `{verb} --help`"
                )
            settings[verb][names[key]] = value
    return settings


def _settable(param: Any) -> list[str]:
    """Under what a parameter is set in a file: its long options without hyphens in front, an argument's own name."""
    options = [name.removeprefix("--") for name in param.opts if name.startswith("--")]
    return options or [param.name]


def _nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'X'?)`, or nothing."""
    found = get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def print_json(value: Any) -> None:
    """Print a document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def show(drawing: RenderableType) -> None:
    """Print what rich draws."""
    from .pages.terminal import terminal

    terminal().print(drawing)


def show_result(drawing: RenderableType, output: Path, file: str, *more: str) -> None:
    """Print what rich draws, then where the result `file` and the page are, then more lines."""
    from .pages.terminal import terminal

    console = terminal()
    console.print(drawing)
    console.print(f"{output}: {file}" + (", report.html" if (output / "report.html").exists() else ""))
    for line in more:
        console.print(line)


def draw_page(write: Callable[[], object], as_json: bool) -> None:
    """Let `write` draw pictures and a page; where it cannot import matplotlib, a note says so, beside JSON none."""
    try:
        write()
    except ImportError:
        if not as_json:
            tell("no pictures: pip install matplotlib", err=True)
