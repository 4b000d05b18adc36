"""What the person who runs long work can put right."""

from __future__ import annotations


class RunError(ValueError):
    """Data, a source, settings or a journal that work cannot use; the message says what, where and the way out."""
