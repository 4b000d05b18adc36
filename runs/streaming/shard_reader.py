"""Read tensors of safetensors shards into memory that is there already, by several threads at once.

Reads go straight to their place on the CPU. On CUDA they go through pinned buffers, each copied on a stream beside the
one that computes, so that the disk, the bus and the kernels work at the same time. Reading beats mapping the file
here: a page that a copy touches first costs a fault, and a cold disk wants many requests at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ...conversion.io.checkpoint import TensorInfo
from ...conversion.io.sources import ConversionError

# Dtypes by the name that safetensors headers use.
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# Bytes of one read and of a pinned buffer; threads that read; buffers of each, one being filled while one is copied.
CHUNK_BYTES, READERS, BUFFERS = 16 * 2**20, 8, 2


@dataclass(frozen=True)
class Piece:
    """Bytes of a file and where they go.

    Attributes:
        file: the shard.
        offset: of the first byte in it.
        target: contiguous bytes, uint8 `[n]`, on any device.
    """

    file: str
    offset: int
    target: torch.Tensor


class ShardReader:
    """Fills tensors from the shards of a folder.

    Args:
        folder: of the shards.
        location: of the checkpoint, as messages name it.
        stream: of the device that the tensors are on, for copies and casts; None for the CPU.
    """

    def __init__(self, folder: Path, location: str, stream: torch.cuda.Stream | None) -> None:
        self._folder, self._location, self._stream = folder, location, stream
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="shard-reader")
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._own = threading.local()

    def close(self) -> None:
        """End the threads and close the files."""
        self._pool.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def fill(self, wanted: Iterable[tuple[TensorInfo, torch.Tensor]]) -> int:
        """Read tensors into contiguous ones of the same shape, which the caller's stream has done with; bytes read.

        Another dtype is cast on the device. On CUDA all is there for any stream when this returns.

        Raises:
            ConversionError: a file that has become shorter, or cannot be read.
        """
        if self._stream is None:
            return self._fill(wanted)
        with torch.cuda.stream(self._stream):
            count = self._fill(wanted)
        self._stream.synchronize()
        return count

    # The mode is a thread's own, and what is filled may have been made in it.
    @torch.inference_mode()
    def _fill(self, wanted: Iterable[tuple[TensorInfo, torch.Tensor]]) -> int:
        pieces, casts = [], []
        for info, target in wanted:
            dtype = DTYPES[info.dtype]
            stored = target
            if dtype != target.dtype:
                stored = torch.empty(info.shape, dtype=dtype, device=target.device)
                casts.append((stored, target))
            flat = stored.view(-1).view(torch.uint8)
            pieces += [
                Piece(info.file, info.begin + first, flat[first : first + CHUNK_BYTES])
                for first in range(0, info.nbytes, CHUNK_BYTES)
            ]
        # The order of the disk; small neighbours together, so that no thread is woken for a few bytes.
        pieces.sort(key=lambda piece: (piece.file, piece.offset))
        for _ in self._pool.map(self._read, _bundles(pieces)):
            pass
        for stored, target in casts:
            target.copy_(stored)
        return sum(piece.target.numel() for piece in pieces)

    @torch.inference_mode()
    def _read(self, bundle: list[Piece]) -> None:
        if self._stream is None:
            for piece in bundle:
                self._read_into(piece.target, piece.file, piece.offset)
            return
        buffer, copied = self._buffer()
        copied.synchronize()
        place = 0
        with torch.cuda.stream(self._stream):
            for piece in bundle:
                part = buffer[place : place + piece.target.numel()]
                self._read_into(part, piece.file, piece.offset)
                piece.target.copy_(part, non_blocking=True)
                place += part.numel()
            copied.record(self._stream)

    def _buffer(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """This thread's pinned buffer whose turn it is, and the event of its last copy."""
        if not hasattr(self._own, "buffers"):
            self._own.turn = 0
            self._own.buffers = [
                (torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
                for _ in range(BUFFERS)
            ]
        self._own.turn += 1
        found: tuple[torch.Tensor, torch.cuda.Event] = self._own.buffers[self._own.turn % BUFFERS]
        return found

    def _read_into(self, target: torch.Tensor, file: str, offset: int) -> None:
        # numpy knows neither bf16 nor fp8: bytes.
        view, done = memoryview(target.numpy().data), 0
        try:
            while done < len(view):
                count = os.preadv(self._descriptor(file), [view[done:]], offset + done)
                if not count:
                    raise OSError(f"{file} ends within a tensor")
                done += count
        except OSError as error:
            raise ConversionError(f"{self._location}: {file} cannot be read ({error}): fetch it again") from error

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(self._folder / file, os.O_RDONLY)
            return self._files[file]


def _bundles(pieces: list[Piece]) -> list[list[Piece]]:
    """Neighbouring pieces in lists of `CHUNK_BYTES` together at most."""
    found: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = piece.target.numel()
        if size > room or not found:
            found.append([])
            room = CHUNK_BYTES
        found[-1].append(piece)
        room -= size
    return found
