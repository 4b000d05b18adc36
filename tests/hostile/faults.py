"""What goes wrong in the child: killed at the n-th change of a file, Ctrl-C there, a pause, a full disk, a bad one.

Every change of a file below the watched folder, its tmp/ apart, is an event: a write, a sync, a rename, a link, a
removal, a new folder or file, a file that safetensors or torch writes by themselves. Events are counted, so that a
fault strikes at the same one every time.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import os
import resource
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Of the longest wait between two tries of a request: what a Hub asks for is not worth waiting for in a test.
LONGEST_SLEEP = 0.02
_CAPABILITIES = ctypes.CDLL(None, use_errno=True)


def install(fault: dict, folder: Path) -> None:
    """Prepare this process, which is a child that runs one verb.

    Args:
        fault: nothing, or `kind`:
            `count` (write the number of events to `file`),
            `kill`, `interrupt`, `pause` (touch `file`, wait for `<file>.go`) at event `at`, a `torn` share of the
            write done,
            `error` (event `at` and all writes after it fail with `errno`),
            `full` (writes fail with ENOSPC after `bytes`),
            `file_size` (the system refuses files beyond `bytes`).
        folder: below it events count.
    """
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, LONGEST_SLEEP))
    drop_root()
    kind = fault.get("kind")
    if kind == "file_size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    elif kind is not None:
        # Started in the background, the server ignores it, and so would its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # One worker: the same event every time.
        os.cpu_count = lambda: 1
        os.sched_getaffinity = lambda pid: {0}
        make_pool = ThreadPoolExecutor.__init__
        ThreadPoolExecutor.__init__ = lambda pool, max_workers=None, *more, **options: make_pool(
            pool, 1, *more, **options
        )
        _Disk(fault, os.path.realpath(folder))


def drop_root() -> None:
    """Make root obey the permissions of files, as everybody else must."""
    if os.geteuid() != 0:
        return
    # linux/capability.h: version 3; bits 1 and 2 are CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if _CAPABILITIES.capget(header, data):
        return
    data[0] &= ~0b110
    _CAPABILITIES.capset(header, data)


class _Disk:
    def __init__(self, fault: dict, root: str) -> None:
        self.fault, self.kind, self.root = fault, fault["kind"], root
        self.events = self.bytes = 0
        self.broken = False
        self.write_descriptor, self.open = os.write, io.open
        for name in (
            "fsync",
            "replace",
            "rename",
            "link",
            "symlink",
            "unlink",
            "remove",
            "mkdir",
            "rmdir",
            "truncate",
        ):
            setattr(os, name, self._event_of(getattr(os, name)))
        os.write = self._os_write
        io.open = builtins.open = self._open
        self._patch_savers()
        if self.kind == "count":
            self._save_count()

    # ---- what strikes ----

    def strike(self, torn=None) -> None:
        """One event; `torn(share)` does a part of it."""
        self.events += 1
        if self.kind == "count":
            self._save_count()
        if self.broken and torn is not None:
            raise OSError(self.fault["errno"], os.strerror(self.fault["errno"]))
        if self.events != self.fault.get("at"):
            return
        if torn is not None and self.kind in ("kill", "error") and self.fault.get("torn"):
            torn(self.fault["torn"])
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.kind == "pause":
            with self.open(self.fault["file"], "w"):
                pass
            while not os.path.exists(self.fault["file"] + ".go"):
                time.sleep(0.01)
        elif self.kind == "error":
            self.broken = True
            raise OSError(self.fault["errno"], os.strerror(self.fault["errno"]))

    def _save_count(self) -> None:
        with self.open(self.fault["file"], "w") as stream:
            stream.write(str(self.events))

    def _room_for(self, length: int) -> int:
        """Bytes of `length` that the disk still takes."""
        if self.kind != "full":
            return length
        room = max(0, min(length, self.fault["bytes"] - self.bytes))
        self.bytes += room
        return room

    # ---- where events come from ----

    def _inside(self, path, folder: int | None = None) -> bool:
        """Whether a path, of a folder's descriptor where there is one, or a descriptor is watched."""
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            elif folder is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
        except OSError:
            return False
        try:
            path = os.path.abspath(os.fsdecode(path))
        except TypeError:
            return False
        return path.startswith(self.root + os.sep) and not path.startswith(os.path.join(self.root, "tmp") + os.sep)

    def _event_of(self, function):
        def changed(path, *arguments, **options):
            folder = options.get("dir_fd", options.get("src_dir_fd"))
            if self._inside(path, folder) or (arguments and self._inside(arguments[0], options.get("dst_dir_fd"))):
                self.strike()
            return function(path, *arguments, **options)

        return changed

    def _os_write(self, descriptor, data):
        if not self._inside(descriptor):
            return self.write_descriptor(descriptor, data)
        view = memoryview(data).cast("B")
        self.strike(lambda share: self.write_descriptor(descriptor, view[: int(len(view) * share)]))
        room = self._room_for(len(view))
        if room < len(view) and not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write_descriptor(descriptor, view[:room])

    def _open(self, file, mode="r", *arguments, **options):
        if not set(mode) & set("wax+") or not self._inside(file):
            return self.open(file, mode, *arguments, **options)
        self.strike()
        return _Written(self.open(file, mode, *arguments, **options), self)

    def _patch_savers(self) -> None:
        """Files that are written past Python: whole, then cut to what the fault leaves of them."""
        import safetensors
        import safetensors.torch
        import torch

        for function, where in ((safetensors.torch.save_file, 1), (torch.save, 1)):
            replacement = self._saver(function, where, safetensors.SafetensorError)
            for module in list(sys.modules.values()):
                for name in [key for key, value in getattr(module, "__dict__", {}).items() if value is function]:
                    setattr(module, name, replacement)

    def _saver(self, function, where, failure):
        def save(*arguments, **options):
            target = arguments[where] if len(arguments) > where else options.get("filename", options.get("f"))
            if not isinstance(target, str | os.PathLike) or not self._inside(target):
                return function(*arguments, **options)
            done = function(*arguments, **options)
            size = os.path.getsize(target)
            try:
                self.strike(lambda share: os.truncate(target, int(size * share)))
            except OSError as error:
                raise failure(
                    f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                ) from None
            room = self._room_for(size)
            if room < size:
                os.truncate(target, room)
                raise failure("Error while serializing: I/O error: No space left on device (os error 28)")
            return done

        return save


class _Written:
    """A file object whose writes are events."""

    def __init__(self, stream, disk: _Disk) -> None:
        self._stream, self._disk = stream, disk

    def write(self, data):
        def torn(share):
            self._stream.write(data[: int(len(data) * share)])
            self._stream.flush()

        self._disk.strike(torn)
        room = self._disk._room_for(len(data))
        if room < len(data):
            self._stream.write(data[:room])
            self._stream.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._stream.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __enter__(self):
        self._stream.__enter__()
        return self

    def __exit__(self, *error):
        return self._stream.__exit__(*error)

    def __iter__(self):
        return iter(self._stream)

    def __getattr__(self, name):
        return getattr(self._stream, name)
