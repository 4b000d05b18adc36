"""What the verbs of the command line print: results, and errors for the person who can fix them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
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
