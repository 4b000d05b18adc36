"""What the person who runs a distillation can mend."""

from __future__ import annotations


class DistillationError(ValueError):
    """Data, source, settings or state that a distillation cannot use; the message says what, where and the mend."""


class DistillationDiverged(DistillationError):
    """The loss, the gradient or the weights are no longer finite, or the loss rose far above its start.

    Args:
        message: what became of what, at which step, and the mend.
        weights_are_sound: the step did not reach the weights; False: the model that is in memory is spoilt.
    """

    def __init__(self, message: str, weights_are_sound: bool = True) -> None:
        super().__init__(message)
        self.weights_are_sound = weights_are_sound
