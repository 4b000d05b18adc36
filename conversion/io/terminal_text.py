"""Text of unknown origin (names on disk, values of a config) as a terminal may show it."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any


def printable(text: str) -> str:
    """The text with control characters, and bytes of names that are no text, as their escapes."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def shown(value: Any, most: int = 100) -> str:
    """A value in a sentence: its `repr`, of which at most so many characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def tell(text: object, *, err: bool = False) -> None:
    """Print one line for a person, `printable`, on stdout or stderr."""
    print(printable(str(text)), file=sys.stderr if err else sys.stdout, flush=True)


def guard_terminal() -> None:
    """Make sure that nothing which this process prints fails for its letters or carries an input's escapes.

    Streams show what their encoding lacks by its escape. Log records of every library, and warnings, are `printable`:
    libraries quote configs and names as they find them.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = _format_warning


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


_python_format_warning = warnings.formatwarning


def _format_warning(message: Any, *args: Any, **kwargs: Any) -> str:
    return printable(_python_format_warning(message, *args, **kwargs))
