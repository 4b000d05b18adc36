"""The one place where kernels are launched: under their tensors' device, whichever device is current.

Triton launches on the current device and its stream. PyTorch's own operations follow their tensors, so a model on
`cuda:1`, or one whose layers lie on several devices, runs while the current device is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch

from .kernel_keys import settle_key


class _ThisThread(local):
    # A default in the class: to look for what a `local` lacks takes two microseconds.
    record: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None] | None = None


_thread = _ThisThread()
_waits: tuple[Callable[[Any, tuple[Any, ...], dict[str, Any]], None], ...] = ()


def launcher(kernel: Any, grid: tuple[int, ...], like: torch.Tensor) -> Callable[..., Any]:
    """What launches `kernel` on the device of `like`, one of its arguments: `kernel[grid]`, to be called with them.

    Where that device is current already, as in most calls, this costs three look-ups and hands no arguments on.
    Nothing waits for the device, so graphs can be recorded, and the current device of this thread is as before
    afterwards.
    """
    settle_key(kernel)
    if not _waits and _thread.record is None:
        index = like.get_device()
        # -1: a CPU's tensors, in Triton's interpreter.
        if index < 0 or index == torch.cuda.current_device():
            launch: Callable[..., Any] = kernel[grid]
            return launch
    return _launcher_of_a_few(kernel, grid, like)


def _launcher_of_a_few(kernel: Any, grid: tuple[int, ...], like: torch.Tensor) -> Callable[..., Any]:
    """For launches that are recorded, go to another device or may have to wait for their kernel."""
    record, waits = _thread.record, _waits
    if record is not None:
        return lambda *arguments, **options: record(kernel, grid, arguments, options)
    index = like.get_device()

    def launch_there(*arguments: Any, **options: Any) -> Any:
        for wait in waits:
            wait(kernel, arguments, options)
        with torch.cuda.device(index):
            return kernel[grid](*arguments, **options)

    return launch_there


class WaitBeforeLaunches:
    """Call `wait(kernel, arguments, options)` before every launch of this process, until `stop`."""

    def __init__(self, wait: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        global _waits
        self._wait = wait
        _waits = (*_waits, wait)

    def stop(self) -> None:
        """Wait no more."""
        global _waits
        _waits = tuple(wait for wait in _waits if wait != self._wait)


@contextmanager
def recorded_launches(
    record: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None],
) -> Iterator[None]:
    """Hand this thread's launches to `record(kernel, grid, arguments, options)`, and run nothing.

    With tensors that have no memory (`pretended_tensors.py`), what a model would launch is known before it runs.
    """
    before = _thread.record
    _thread.record = record
    try:
        yield
    finally:
        _thread.record = before


def are_recorded() -> bool:
    """Whether this thread's launches are recorded."""
    return _thread.record is not None


def tile_options(tile: Any) -> dict[str, int]:
    """A named tuple of a kernel's launch shape as its options: `BLOCK_M` for `block_m`, `num_warps` as it is."""
    return {name if name.startswith("num_") else name.upper(): value for name, value in tile._asdict().items()}


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` with the entries of a row next to each other, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether the stream that runs work on `tensor` is being recorded as a CUDA graph."""
    if not tensor.is_cuda or are_recorded():
        return False
    with torch.cuda.device(tensor.get_device()):
        return torch.cuda.is_current_stream_capturing()
