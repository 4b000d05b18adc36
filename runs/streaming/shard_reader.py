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
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
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
        device: where the tensors are.

    Attributes:
        stream: what copies run on; None off CUDA. A reader of the tensors waits for it.
        bytes_read: so far.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.bytes_read = 0
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="shard-reader")
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._own = threading.local()

    def close(self) -> None:
        """Close the files."""
        self._pool.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def fill(self, wanted: Iterable[tuple[TensorInfo, torch.Tensor]]) -> None:
        """Read tensors into contiguous ones of the same shape; another dtype is cast on their device.

        Returns when every byte is read and, on CUDA, every copy is queued on `stream`.

        Raises:
            ConversionError: a file that has become shorter, or cannot be read.
        """
        pieces, casts = [], []
        for info, target in wanted:
            dtype = DTYPES[info.dtype]
            stored = target
            if dtype != target.dtype:
                stored = torch.empty(info.shape, dtype=dtype, device=target.device)
                casts.append((stored, target))
            flat = stored.reshape(-1).view(torch.uint8)
            pieces += [
                Piece(info.file, info.begin + first, flat[first : first + CHUNK_BYTES])
                for first in range(0, info.nbytes, CHUNK_BYTES)
            ]
        # The order of the disk; small neighbours together, so that no thread is woken for a few bytes.
        pieces.sort(key=lambda piece: (piece.file, piece.offset))
        for _ in self._pool.map(self._read, _bundles(pieces)):
            pass
        self.bytes_read += sum(piece.target.numel() for piece in pieces)
        for stored, target in casts:
            target.copy_(stored)

    def _read(self, bundle: list[Piece]) -> None:
        if self.stream is None:
            for piece in bundle:
                self._read_into(piece.target, piece.file, piece.offset)
            return
        buffer, copied = self._buffer()
        copied.synchronize()
        place = 0
        with torch.cuda.stream(self.stream):
            for piece in bundle:
                part = buffer[place : place + piece.target.numel()]
                self._read_into(part, piece.file, piece.offset)
                piece.target.copy_(part, non_blocking=True)
                place += part.numel()
            copied.record(self.stream)

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
        view, done = memoryview(target.numpy().data), 0
        try:
            while done < len(view):
                count = os.preadv(self._descriptor(file), [view[done:]], offset + done)
                if count == 0:
                    raise ConversionError(f"{self.folder / file} became shorter while it was read: fetch it again")
                done += count
        except OSError as error:
            raise ConversionError(f"{self.folder / file} cannot be read: {error.strerror}") from error

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(self.folder / file, os.O_RDONLY)
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
