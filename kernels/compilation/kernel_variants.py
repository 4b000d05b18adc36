"""The variants of kernels that launches ask for, and their compilation before they are needed.

Triton compiles a kernel anew for other dtypes and constants, and for integers that are 1, a multiple of 16 or neither,
unless it is to ignore them. A variant is one such case.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from threading import Condition, Thread, main_thread
from typing import Any, NamedTuple

import torch

from ..common.kernel_keys import settle_key
from ..common.kernel_launch import WaitBeforeLaunches
from .compile_process import CompileProcess, NotCompiledThere

Key = tuple[Any, ...]


class Variant(NamedTuple):
    """One case of a kernel, with a launch that asks for it.

    Attributes:
        kernel: the kernel.
        key: what Triton distinguishes, by argument.
        grid: of the launch.
        arguments: of the launch, in the kernel's order.
        options: of the launch: constants and compiler options by name.
    """

    kernel: Any
    key: Key
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.fn.__name__)

    def compile(self) -> Any:
        """Compile for the current device and put the result in Triton's cache, on disk and in this process.

        Returns:
            Triton's compiled kernel.
        """
        settle_key(self.kernel)
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)

    def load(self) -> Any:
        """Compile, load the kernel onto the current device and make what launches it, as its first launch would.

        Returns:
            Triton's compiled kernel.
        """
        compiled = self.compile()
        if compiled is not None:
            compiled.run  # noqa: B018 - a property that does its work when it is first read
        return compiled


class VariantList:
    """Collects the variants of launches: give `record` to `recorded_launches`."""

    def __init__(self) -> None:
        self._found: dict[Key, Variant] = {}

    def record(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note a launch."""
        key = variant_key(kernel, arguments, options)
        self._found.setdefault(key, Variant(kernel, key, grid, arguments, options))

    @property
    def variants(self) -> list[Variant]:
        """Each variant once, in the order of their first launches."""
        return list(self._found.values())


def variant_key(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Key:
    """What Triton distinguishes of a launch: the kernel, and the case of each argument and option by name."""
    known = {parameter.name: parameter for parameter in kernel.params}
    given = dict(zip(known, arguments)) | options
    cases = (f"{kernel.fn.__module__}.{kernel.fn.__qualname__}",)
    return cases + tuple((name, _case_of(known.get(name), value)) for name, value in sorted(given.items()))


def _case_of(parameter: Any, value: Any) -> Any:
    if parameter is None or parameter.is_constexpr or value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if hasattr(value, "base"):
        return str(value.base.dtype), tuple(value.block_shape), repr(getattr(value, "layout", None))
    if isinstance(value, int):
        wide = "i32" if -(2**31) <= value < 2**31 else "i64"
        if parameter.do_not_specialize:
            return wide
        return "1" if value == 1 else (wide, not parameter.do_not_specialize_on_alignment and value % 16 == 0)
    return type(value).__name__


class Compilations:
    """Variants on their way: other processes compile them, threads until those are ready. Launches wait for theirs.

    A variant that does not compile is left to the launch that needs it, where its error is dealt with. When the
    process ends, what is not begun is dropped.

    Args:
        device: what to load kernels onto; on a CPU they are compiled alone.
        jobs: threads that compile.
        process: what compiles once it is ready; the threads then wait for it. It is closed at the end.
    """

    def __init__(self, device: torch.device, jobs: int, process: CompileProcess | None = None) -> None:
        self._device, self._jobs, self._process = device, jobs, process
        self._changed = Condition()
        self._queue: deque[Variant] = deque()
        self._closed = False
        self._pending: dict[Key, Future[str | None]] = {}
        self._waiting = WaitBeforeLaunches(self._wait)
        number = jobs if process is None else max(jobs, process.jobs)
        self._threads = [Thread(target=self._work, args=(i,), name=f"indexcache-compile-{i}") for i in range(number)]
        for thread in self._threads:
            thread.start()
        if process is not None:
            process.on_change(self._notify)

    def add(self, variants: Iterable[Variant]) -> None:
        """Begin to compile these, in this order, unless they are known."""
        with self._changed:
            for variant in variants:
                if variant.key not in self._pending:
                    self._pending[variant.key] = Future()
                    self._queue.append(variant)
            self._changed.notify_all()

    def finish(self) -> dict[Key, str | None]:
        """Wait for all: why each variant that was compiled here failed, or None if it did not."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._waiting.stop()
        if self._process is not None:
            self._process.close()
        for future in self._pending.values():
            future.cancel()
        return {key: future.result() for key, future in self._pending.items() if not future.cancelled()}

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self, index: int) -> None:
        while (variant := self._next(index)) is not None:
            future = self._pending[variant.key]
            if not main_thread().is_alive():
                future.cancel()
            elif future.set_running_or_notify_cancel():
                future.set_result(self._compile(variant))

    def _next(self, index: int) -> Variant | None:
        """What this thread compiles next; those beyond `jobs` only hand over to the side process."""
        with self._changed:
            while True:
                process = self._process
                if index >= self._jobs and (process is None or process.is_gone):
                    return None
                if self._queue and (index < self._jobs or (process is not None and process.is_ready)):
                    return self._queue.popleft()
                if self._closed and not self._queue:
                    return None
                self._changed.wait()

    def _compile(self, variant: Variant) -> str | None:
        process = self._process
        try:
            if process is None or not process.is_ready:
                self._load(variant)
                return None
            try:
                key = process.compile(variant.kernel, variant.grid, variant.arguments, variant.options)
            except NotCompiledThere as error:
                if not main_thread().is_alive():
                    return str(error)
                self._load(variant)
                return None
            compiled = self._load(variant)
            if compiled is not None and compiled.hash != key:
                process.close("Triton does not find here what was compiled there")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _load(self, variant: Variant) -> Any:
        if self._device.type != "cuda":
            return variant.compile()
        with torch.cuda.device(self._device):
            return variant.load()

    def _wait(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        future = self._pending.get(variant_key(kernel, arguments, options))
        # Not begun, it is the launch's own to compile.
        if future is not None and not future.cancel():
            future.result()
