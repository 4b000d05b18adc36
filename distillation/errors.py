"""What the person who runs a distillation can mend."""

from __future__ import annotations


class DistillationError(ValueError):
    """Data, source, settings or state that a distillation cannot use; the message says what, where and the mend."""


class DistillationDiverged(DistillationError):
    """The loss became NaN or rose far above its start."""
