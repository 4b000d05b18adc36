"""The terminal that everything is printed on: names of files and models appear as they are, escapes as text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from ...conversion.io.terminal_text import printable


class _Terminal(Console):
    """A console on which what is printed cannot steer the terminal: colours are the console's own alone."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """See `Console.render`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def text_streamer(tokenizer: Any) -> Any:
    """Transformers' TextStreamer; on a terminal what a model writes cannot steer it, elsewhere it is as it is."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    if sys.stdout.isatty():
        show = streamer.on_finalized_text
        streamer.on_finalized_text = lambda text, stream_end=False: show(printable(text), stream_end)  # type: ignore
    return streamer


def terminal(stderr: bool = False, soft_wrap: bool | None = None) -> Console:
    """A console that takes no `[...]` in what it prints for markup, no `:name:` for an emoji, and no escape sequence.

    Args:
        stderr: print there.
        soft_wrap: leave long lines whole; by default where the output is no terminal.
    """
    stream = sys.stderr if stderr else sys.stdout
    return _Terminal(
        stderr=stderr, markup=False, emoji=False, soft_wrap=not stream.isatty() if soft_wrap is None else soft_wrap
    )
