"""What the person who evaluates can mend."""

from __future__ import annotations


class EvaluationError(ValueError):
    """Data, source or settings that cannot be used; the message says what, where and how to mend it."""
