"""Kernels compiled in processes beside this one, where Python's lock is nobody else's; Triton's cache is the way back.

Triton holds Python's lock for half of a compilation, so that threads get in each other's way and in the way of the
model that waits. One side process imports PyTorch, Triton and the kernels' files, as this process found them, and
forks for every variant that it is handed: it has one thread then and never touched a GPU. It runs nothing of
`__main__`, sees no GPU, and ends with this process, however that ends.

INDEXCACHE_COMPILE_PROCESSES says how many variants are compiled at a time; 0 leaves all to threads.
"""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from typing import Any, NoReturn

import torch

from ..common.kernel_keys import settle_key

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
except ImportError:
    triton = None

COMPILE_PROCESSES = "INDEXCACHE_COMPILE_PROCESSES"
MOST_PROCESSES = 12
# With fewer processors, what it takes to start is missing where the first token is made.
LEAST_PROCESSORS = 4
# Whoever looks whether another still lives does so as often.
SECONDS_BETWEEN_LOOKS = 0.5

# Why it is gone when nothing went wrong.
CLOSED = "closed"

_imported_by = os.getpid()
_FRAME = struct.Struct("!QQ")

# Packages are stood in for by their folders: nothing of theirs runs but the files that kernels need.
_BEGIN = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
import importlib, json, sys, types
given = json.loads(open(0, "rb", buffering=0, closefd=False).readline())
sys.path[:] = given["path"]
for name, folders in given["packages"].items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = folders
importlib.import_module(given["module"]).serve(given["parent"], given["target"])
"""


class NotCompiledThere(Exception):
    """The side process cannot compile this, or is gone: whoever asked compiles it."""


class CompilationFailed(Exception):
    """A variant that does not compile, with the reason."""


class NoDriver:
    """What Triton asks of a driver to compile: for which target. Nothing here touches a GPU."""

    def __init__(self, backend: str, arch: int | str, warp_size: int) -> None:
        self._target = GPUTarget(backend, arch, warp_size)

    def get_current_device(self) -> int:
        """Any."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Any."""
        return 0

    def get_current_target(self) -> Any:
        """What is compiled for."""
        return self._target


def build_launcher(compiled: Any) -> None:
    """Let Triton 3.6 build what launches a kernel, for which it runs a C compiler; later releases have it built in.

    It needs the driver's library: without one the first launch builds it.
    """
    with suppress(Exception):
        nvidia = importlib.import_module("triton.backends.nvidia.driver")
        nvidia.CudaLauncher(compiled.src, compiled.metadata)


def processes_wanted() -> int:
    """How many variants processes would compile at a time here; 0: they must not, or it would not be worth it."""
    wanted = os.environ.get(COMPILE_PROCESSES, "")
    processors = os.cpu_count() or 1
    number = MOST_PROCESSES if processors >= LEAST_PROCESSORS else 0
    number = int(wanted) if wanted.isdigit() else min(number, processors)
    return number if number and _may_start() else 0


def _may_start() -> bool:
    """Whether this is a process of its own, whose interpreter and whose Triton another process can be given."""
    python = os.path.basename(sys.executable or "")
    if os.name != "posix" or not python.startswith(("python", "pypy")) or getattr(sys, "frozen", False):
        return False
    is_child = os.getpid() != _imported_by or multiprocessing.parent_process() is not None
    if is_child or sys.is_finalizing() or not threading.main_thread().is_alive():
        return False
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return False
    try:
        knobs = triton.knobs
        # What is always compiled anew, or by code that this process was given, does not come back from a cache.
        return not (
            knobs.runtime.interpret
            or knobs.compilation.always_compile
            or getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None
        )
    except Exception:
        return False


class CompileProcess:
    """The side process, as this one sees it; it gets ready while this one goes on.

    Args:
        jobs: how many variants are to be compiled at a time.
        target: backend, architecture and threads of a warp, as Triton's driver says.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, jobs: int, target: tuple[str, int | str, int]) -> None:
        self.jobs = jobs
        self._on_change: Callable[[], None] = lambda: None
        self._ready = self._gone = False
        self.why_gone = ""
        self._lock = threading.Lock()
        self._asked: dict[int, Future[str]] = {}
        hidden = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
        environment = os.environ | hidden | {"TRITON_CACHE_DIR": str(triton.knobs.cache.dir)}
        # Isolated: nothing from the current folder is imported; what this process imports from is handed over.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BEGIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        given = {"path": sys.path, "packages": _packages(), "module": __name__}
        self._write(json.dumps(given | {"parent": os.getpid(), "target": target}).encode() + b"\n")
        threading.Thread(target=self._read, name="indexcache-compile-process", daemon=True).start()

    @property
    def is_ready(self) -> bool:
        """Whether it can compile now."""
        return self._ready and not self._gone

    @property
    def is_gone(self) -> bool:
        """Whether it will not compile any more; `why_gone` says why."""
        return self._gone

    def on_change(self, call: Callable[[], None]) -> None:
        """Call this, in whatever thread, when it gets ready or is gone; at once if it is."""
        self._on_change = call
        if self._ready or self._gone:
            call()

    def compile(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
        """Let it compile a variant into Triton's cache, and wait for that.

        Returns:
            The key of Triton's cache.

        Raises:
            CompilationFailed: it does not compile.
            NotCompiledThere: it was not compiled.
        """
        try:
            data = _packed((kernel, grid, arguments, options))
        except Exception as error:
            raise NotCompiledThere(f"{type(error).__name__}: {error}") from error
        answer: Future[str] = Future()
        with self._lock:
            if self._gone:
                raise NotCompiledThere(self.why_gone)
            number = len(self._asked)
            self._asked[number] = answer
        self._write(_FRAME.pack(number, len(data)) + data)
        while True:
            try:
                return answer.result(SECONDS_BETWEEN_LOOKS)
            except NotYet:
                if not threading.main_thread().is_alive():
                    raise NotCompiledThere("this process ends") from None

    def close(self, reason: str = CLOSED) -> None:
        """Let it end, and wait for that."""
        self._fail_all(reason)
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        if not self._ready:
            # It has forked nothing yet, and nobody need wait until it has imported all.
            self._process.kill()
        try:
            self._process.wait(10 * SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, data: bytes) -> None:
        try:
            with self._lock:
                view = memoryview(data)
                while view:
                    view = view[self._process.stdin.write(view) :]  # type: ignore[union-attr]
        except (OSError, ValueError) as error:
            self._fail_all(f"{type(error).__name__}: {error}")

    def _read(self) -> None:
        with suppress(OSError, ValueError), io.BufferedReader(self._process.stdout) as lines:  # type: ignore[type-var]
            for line in lines:
                number, key, error = json.loads(line)
                if number is None:
                    self._ready = True
                    self._on_change()
                    continue
                # It may have been closed meanwhile.
                with suppress(InvalidStateError):
                    if error is None:
                        self._asked[number].set_result(key)
                    else:
                        self._asked[number].set_exception(CompilationFailed(error))
        self._fail_all("the side process has ended")

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            self.why_gone, self._gone = self.why_gone or reason, True
            waiting = [answer for answer in self._asked.values() if not answer.done()]
        for answer in waiting:
            # The thread that reads may answer at this moment.
            with suppress(InvalidStateError):
                answer.set_exception(NotCompiledThere(reason))
        self._on_change()


def _packages() -> dict[str, list[str]]:
    """The folders of each package that this file lies in, by name."""
    parts = __name__.split(".")[:-1]
    names = [".".join(parts[: number + 1]) for number in range(len(parts))]
    # The folder that holds the kernels' files comes with their package.
    return {name: [str(folder) for folder in sys.modules[name].__path__] for name in names}


class _Pickler(pickle.Pickler):
    """Tensors go as their dtype, kernels as their names: what decides on a variant, and no more."""

    def reducer_override(self, value: Any) -> Any:
        """Called for everything that is packed."""
        if isinstance(value, torch.Tensor):
            return _tensor, (value.dtype,)
        # Of the class: the property of a kernel would digest it here, before all that it calls.
        if hasattr(type(value), "cache_key"):
            module, name = value.fn.__module__, value.fn.__name__
            if getattr(sys.modules.get(module), name, None) is not value:
                raise pickle.PicklingError(f"{module} has no kernel {name}")
            return _named, (module, name)
        return NotImplemented


def _packed(value: Any) -> bytes:
    data = io.BytesIO()
    _Pickler(data, pickle.HIGHEST_PROTOCOL).dump(value)
    return data.getvalue()


def _tensor(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="meta")


def _named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def serve(parent: int, target: tuple[str, int | str, int]) -> NoReturn:
    """Be the side process: compile what comes in, until the parent closes the pipe or is gone.

    Args:
        parent: its process id.
        target: what to compile for.
    """
    # Kernels' files may print; what the parent reads is ours.
    answers = os.dup(1)
    os.dup2(2, 1)
    driver.set_active(NoDriver(*target))
    with suppress(Exception):
        # A digest of Triton itself, kept for all that are forked.
        importlib.import_module("triton.runtime.cache").triton_key()
    side = _SideProcess(answers)
    try:
        side.answer(None)
        while os.getppid() == parent and side.turn():
            pass
    finally:
        # What went wrong, if nobody reads any more or files cannot be read, is the parent's to notice: it compiles.
        side.end()
        os._exit(0)


class _SideProcess:
    """What the side process knows: what it has read, and which process compiles which variant."""

    def __init__(self, answers: int) -> None:
        self._answers, self._data = answers, b""
        self._compiling: dict[int, tuple[int, int]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)

    def answer(self, number: int | None, key: str | None = None, error: str | None = None) -> None:
        """Tell the parent; a number of None: all is ready."""
        os.write(self._answers, json.dumps([number, key, error]).encode() + b"\n")

    def turn(self) -> bool:
        """Deal with what has come in since; False: nothing will any more."""
        for ready, _ in self._selector.select(SECONDS_BETWEEN_LOOKS):
            if ready.fd != 0:
                self._finish(ready.fd)
                continue
            data = os.read(0, 1 << 20)
            if not data:
                return False
            self._data += data
            while len(self._data) >= _FRAME.size:
                number, length = _FRAME.unpack_from(self._data)
                end = _FRAME.size + length
                if len(self._data) < end:
                    break
                variant, self._data = self._data[_FRAME.size : end], self._data[end:]
                self._begin(number, variant)
        return True

    def end(self) -> None:
        """End what still compiles: nobody waits for it."""
        for _, process in self._compiling.values():
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)

    def _begin(self, number: int, data: bytes) -> None:
        # Here, so that the kernels' files are read once. Where that fails, so will the next: this process ends.
        variant = pickle.loads(data)
        reads, writes = os.pipe()
        process = os.fork()
        if process == 0:
            _compile_and_exit(variant, writes, (0, reads, self._answers))
        os.close(writes)
        self._compiling[reads] = number, process
        self._selector.register(reads, selectors.EVENT_READ)

    def _finish(self, reads: int) -> None:
        # So short that it was written in one piece.
        said = os.read(reads, 1 << 16)
        self._selector.unregister(reads)
        os.close(reads)
        number, process = self._compiling.pop(reads)
        _, status = os.waitpid(process, 0)
        key, error = json.loads(said) if said else (None, f"the compiler ended with status {status}")
        self.answer(number, key, error)


def _compile_and_exit(variant: tuple[Any, ...], writes: int, others: tuple[int, ...]) -> NoReturn:
    """In a process of its own: compile, say so, and be gone."""
    try:
        for each in others:
            os.close(each)
        kernel, grid, arguments, options = variant
        settle_key(kernel)
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        build_launcher(compiled)
        said = [compiled.hash, None]
    except BaseException as error:
        said = [None, f"{type(error).__name__}: {error}"[:500]]
    try:
        os.write(writes, json.dumps(said).encode())
    finally:
        os._exit(0)
