"""Which backend runs an operation: one policy for all of them.

- An `Operation` lists its backends in order, and the first that takes the arguments runs.
- Out of memory and faults of the device are raised: they say nothing about a backend, which the next call tries again.
- A backend that fails to compile is set aside for its device, until the process ends, and the next one runs.
- That a slower backend runs than one expects is said once, with its reason. `no_fallback` makes it an error instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from .triton_support import NO_TRITON, has_kernels, triton

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
_ran: list[tuple[str, str]] | None = None


_Result = TypeVar("_Result")


class FallbackError(RuntimeError):
    """A slower backend would run, and `no_fallback` forbids it."""


def takes_all(*_: Any) -> None:
    """The `why_not` of a backend that takes every argument, as PyTorch does."""
    return


class Backend(NamedTuple, Generic[_Result]):
    """One way to run an operation.

    Attributes:
        name: as it is shown.
        why_not: why it does not take these arguments, or None when it does.
        run: the operation.
        optional: made for some shapes; that it does not take others is nothing to speak of.
    """

    name: str
    why_not: Callable[..., str | None]
    run: Callable[..., _Result]
    optional: bool = False


class Operation(Generic[_Result]):
    """What is computed, with its backends, the fastest first; the last takes all arguments and needs no kernels.

    Attributes:
        name: as it is shown; of two stages of one function `function: stage`.
        backends: in their order.
        defined_in: name of the file.
        examples: arguments of typical shapes by name, made by a function like `torch.empty` with bf16 for its dtype.
    """

    def __init__(
        self,
        name: str,
        *backends: Backend[_Result],
        **examples: Callable[[Callable[..., torch.Tensor]], tuple[Any, ...]],
    ) -> None:
        self.name, self.backends, self.examples = name, backends, examples
        self.defined_in = sys._getframe(1).f_globals["__name__"].rpartition(".")[2]

    def __call__(self, device: torch.device, *arguments: Any, allow_triton: bool = True) -> _Result:
        """Run the first backend that takes `arguments`, or without `allow_triton` the last.

        Raises:
            torch.OutOfMemoryError: for what the allocator or the driver had no memory for.
            FallbackError: where `no_fallback` forbids the backend that would run.
            Exception: what the last backend raised, and any backend's error that is not about compiling it.
        """
        last = self.backends[-1]
        if not allow_triton or torch.compiler.is_compiling():
            return last.run(*arguments)
        while True:
            backend = self.choose(device, *arguments)
            if _ran is not None:
                _ran.append((self.name, backend.name))
            try:
                return backend.run(*arguments)
            except Exception as error:
                if backend is last:
                    raise
                if _is_out_of_memory(error):
                    raise torch.OutOfMemoryError(str(error)) from error
                if not fails_to_compile(error) or _forbidden:
                    raise
                reason = f"it does not compile here ({type(error).__name__}: {_first_line(error)})"
                _set_aside[self.name, backend.name, device] = reason

    def choose(self, device: torch.device, *arguments: Any) -> Backend[_Result]:
        """The backend that runs `arguments`, without running it; says what a slower one is chosen for.

        Raises:
            FallbackError: where `no_fallback` forbids it.
        """
        if not has_kernels(device):
            if device.type == "cuda":
                say_fallback("indexcache", "Triton", NO_TRITON, device)
            return self.backends[-1]
        for backend in self.backends[:-1]:
            reason = _set_aside.get((self.name, backend.name, device))
            if reason is None:
                reason = backend.why_not(*arguments)
                if reason is None:
                    return backend
                if backend.optional:
                    continue
            say_fallback(self.name, backend.name, reason, device)
        return self.backends[-1]

    def chooses_kernels(self, device: torch.device, *arguments: Any) -> bool:
        """Whether a backend other than the last runs `arguments`."""
        return self.choose(device, *arguments) is not self.backends[-1]

    def explain(self, device: torch.device, *arguments: Any) -> tuple[str, dict[str, str]]:
        """The name of the backend that runs `arguments`, and why not each that comes before it."""
        reasons: dict[str, str] = {}
        for backend in self.backends[:-1]:
            reason = _set_aside.get((self.name, backend.name, device))
            if not has_kernels(device):
                reason = NO_TRITON if device.type == "cuda" else f"kernels need a GPU, not {device.type}"
            elif reason is None:
                reason = backend.why_not(*arguments)
            if reason is None:
                return backend.name, reasons
            reasons[backend.name] = reason
        return self.backends[-1].name, reasons


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
def no_fallback() -> Iterator[list[tuple[str, str]]]:
    """Make falling back to another backend an error, in all threads: for tests and benchmarks.

    Gives a list that fills with the names of each operation that runs inside, and of the backend that runs it.
    """
    global _forbidden, _ran
    before, _forbidden, _ran = (_forbidden, _ran), True, []
    try:
        yield _ran
    finally:
        _forbidden, _ran = before


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
