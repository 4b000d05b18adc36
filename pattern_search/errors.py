"""What the person who runs a search can mend."""

from __future__ import annotations

from ..runs.errors import EvaluationError


class PatternSearchError(EvaluationError):
    """Data, source, settings or journal that a search cannot use; the message says what, where and how to mend it."""
