"""Which backend runs an operation: one policy for all of them.

- The first backend in the operation's order that takes the arguments runs.
- Out of memory and faults of the device are raised: they say nothing about a backend, which the next call tries again.
- A backend that fails to compile is set aside for its device, until the process ends, and the next one runs.
- That a slower backend runs than one expects is said once, with its reason. `no_fallback` makes it an error instead.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

try:
    import triton
except ImportError:
    triton = None

# Set to 1, falling back is an error in the whole process.
NO_FALLBACK = "INDEXCACHE_NO_FALLBACK"

_COMPILE_ERRORS: tuple[type[BaseException], ...] = (
    RuntimeError,
    AttributeError,
    TypeError,
    KeyError,
    AssertionError,
    OSError,
    subprocess.SubprocessError,
)
if triton is not None:
    # Neither is a RuntimeError. `OutOfResources`: more shared memory or registers than this device has.
    _COMPILE_ERRORS += (triton.CompilationError, triton.runtime.errors.TritonError)
_DEVICE_ERRORS: tuple[type[BaseException], ...] = (torch.OutOfMemoryError,)
if hasattr(torch, "AcceleratorError"):
    _DEVICE_ERRORS += (torch.AcceleratorError,)
# What errors of the driver begin with that are RuntimeErrors and no more.
_DEVICE_WORDS = ("Triton Error [", "CUDA error", "CUDA driver error", "HIP error", "NCCL", "CUBLAS_STATUS", "cuDNN")

_set_aside: dict[tuple[str, str, torch.device], str] = {}
_said: set[str] = set()
_forbidden = os.environ.get(NO_FALLBACK, "") not in ("", "0")


class FallbackError(RuntimeError):
    """A slower backend would run, and `no_fallback` forbids it."""


def takes_all(*_: Any) -> None:
    """The `why_not` of a backend that takes every argument, as PyTorch does."""
    return


class Backend(NamedTuple):
    """One way to run an operation.

    Attributes:
        name: as it is shown.
        why_not: why it does not take these arguments, or None when it does.
        run: the operation.
        optional: made for some shapes; that it does not take others is nothing to speak of.
    """

    name: str
    why_not: Callable[..., str | None]
    run: Callable[..., Any]
    optional: bool = False


def dispatch(operation: str, backends: Sequence[Backend], device: torch.device, *arguments: Any) -> Any:
    """Run the first of `backends` that takes `arguments`; the last must take all.

    Raises:
        torch.OutOfMemoryError: for what the allocator or the driver had no memory for.
        FallbackError: where `no_fallback` forbids the backend that would run.
        Exception: what the last backend raised, and any backend's error that is not about compiling it.
    """
    for backend in backends[:-1]:
        place = (operation, backend.name, device)
        reason = _set_aside.get(place)
        if reason is None:
            reason = backend.why_not(*arguments)
            if reason is not None and backend.optional:
                continue
        if reason is None:
            try:
                return backend.run(*arguments)
            except Exception as error:
                if _is_out_of_memory(error):
                    raise torch.OutOfMemoryError(str(error)) from error
                if not fails_to_compile(error) or _forbidden:
                    raise
                reason = f"it does not compile here ({type(error).__name__}: {_first_line(error)})"
                _set_aside[place] = reason
        say_fallback(operation, backend.name, reason, device)
    return backends[-1].run(*arguments)


def fails_to_compile(error: BaseException) -> bool:
    """Whether an error says that a kernel cannot be compiled, and not that a device has no memory or is at fault."""
    if isinstance(error, (*_DEVICE_ERRORS, FallbackError)) or not isinstance(error, _COMPILE_ERRORS):
        return False
    return not (type(error) is RuntimeError and any(words in str(error) for words in _DEVICE_WORDS))


def why_set_aside() -> dict[str, str]:
    """Why backends were set aside, by `operation: backend on device`."""
    return {f"{operation}: {name} on {device}": reason for (operation, name, device), reason in _set_aside.items()}


def forget_failures() -> None:
    """Try every backend again, and say again what was said."""
    _set_aside.clear()
    _said.clear()


@contextmanager
def no_fallback() -> Iterator[None]:
    """Make falling back to another backend an error, in all threads: for tests and benchmarks."""
    global _forbidden
    before, _forbidden = _forbidden, True
    try:
        yield
    finally:
        _forbidden = before


def say_fallback(operation: str, backend: str, reason: str, device: torch.device) -> None:
    """Say once that an operation runs slower than it could.

    Raises:
        FallbackError: where `no_fallback` forbids it.
    """
    message = f"{operation} does not run in {backend}, but slower, on {device}: {reason}"
    if _forbidden:
        raise FallbackError(message)
    if message not in _said and not torch.compiler.is_compiling():
        _said.add(message)
        warnings.warn(message, stacklevel=4)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether it is the driver's "out of memory", when a kernel is loaded or launched."""
    return type(error) is RuntimeError and "out of memory" in str(error)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
