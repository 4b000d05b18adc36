"""Text of unknown origin (names on disk, values of a config) as a terminal may show it."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control characters, and bytes of names that are no text, as their escapes."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )
