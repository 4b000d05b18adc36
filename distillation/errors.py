"""What the person who runs a distillation can fix."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..runs.errors import RunError


class DistillationDiverged(RunError):
    """The loss, the gradient or the weights are no longer finite, or the loss rose far above its start.

    Args:
        message: what became of what, at which step, and the fix.
        weights_are_sound: the step did not reach the weights; False: the model in memory is damaged.
    """

    def __init__(self, message: str, weights_are_sound: bool = True) -> None:
        super().__init__(message)
        self.weights_are_sound = weights_are_sound


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns what the weights' writers make of a full disk, a quota or a limit of a file's size into an OSError.

    Args:
        folder: written to, and named.

    Raises:
        OSError: with the system's number where the writer gives it.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(folder)) from error
    except (SafetensorError, RuntimeError) as error:
        named = re.search(r"\(os error (\d+)\)", str(error))
        if named is not None and "serializ" in str(error):
            number = int(named[1])
        elif isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|inline_container", str(error)):
            cause = error.__context__
            number = cause.errno or 0 if isinstance(cause, OSError) else 0
        else:
            raise
        reason = os.strerror(number) if number else "a file cannot be written (is the disk full?)"
        raise OSError(number, f"{reason}; make room and go on with --resume", str(folder)) from error
