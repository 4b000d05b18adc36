"""The terminal that everything is printed on: names of files and models appear as they are."""

from __future__ import annotations

import sys

from rich.console import Console


def terminal(stderr: bool = False, soft_wrap: bool | None = None) -> Console:
    """A console that takes no `[...]` in what it prints for markup, and no `:name:` for an emoji.

    Args:
        stderr: print there.
        soft_wrap: leave long lines whole; by default where the output is no terminal.
    """
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, markup=False, emoji=False, soft_wrap=not stream.isatty() if soft_wrap is None else soft_wrap
    )
