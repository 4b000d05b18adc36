"""The bytes of a planned tensor, in blocks of a few MB: copied as they are, cast, or dequantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

import torch

from .checkpoint import DTYPE_BITS, TensorInfo
from .fp8 import dequantise_block
from .sources import ConversionError, Source

BLOCK_BYTES = 4 << 20
_BLOCK_ELEMENTS = 1 << 20

TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the output: where its bytes come from, and the dtype it gets (`scale` is read to dequantise)."""

    source: TensorInfo
    dtype: str
    scale: TensorInfo | None = None
    block_size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Its name, the same in source and output."""
        return self.source.name

    @property
    def is_copied(self) -> bool:
        """Whether its bytes stay as they are."""
        return self.dtype == self.source.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.source.nbytes * DTYPE_BITS[self.dtype] // DTYPE_BITS[self.source.dtype]


class OpenShards:
    """The source shards that are being read. A shard stays on this machine until another set is asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._open: dict[str, tuple[ExitStack, BinaryIO]] = {}
        self._buffer = bytearray(BLOCK_BYTES)

    def hold(self, files: list[str]) -> None:
        """Have just these shards open; close (and, for a Hub source, remove) the others."""
        for file in set(self._open) - set(files):
            self._open.pop(file)[0].close()
        for file in files:
            if file not in self._open:
                with ExitStack() as stack:
                    path = stack.enter_context(self.source.local(file))
                    stream = stack.enter_context(open(path, "rb", buffering=0))
                    self._open[file] = (stack.pop_all(), stream)

    def abandon(self) -> None:
        """Close all after an error, leaving downloads where they are."""
        for stack, stream in self._open.values():
            stream.close()
            stack.pop_all()
        self._open.clear()

    def blocks(self, info: TensorInfo) -> Iterator[memoryview]:
        """A tensor's bytes in order; each block is valid until the next is asked for."""
        stream, view = self._open[info.file][1], memoryview(self._buffer)
        stream.seek(info.begin)
        left = info.nbytes
        while left:
            count = stream.readinto(view[: min(left, BLOCK_BYTES)])  # type: ignore[attr-defined]
            if not count:
                raise ConversionError(f"{info.file} ends {left} bytes before the end of {info.name}: fetch it again")
            yield view[:count]
            left -= count

    def read(self, info: TensorInfo, begin: int, end: int) -> bytearray:
        """Bytes `begin` to `end` of a tensor."""
        found = bytearray(end - begin)
        part = TensorInfo(info.name, info.file, info.dtype, (), info.begin + begin, info.begin + end)
        filled = 0
        for block in self.blocks(part):
            found[filled : filled + len(block)] = block
            filled += len(block)
        return found

    def read_whole(self, info: TensorInfo) -> bytearray:
        """A small tensor from any shard of the source, held or not."""
        return bytearray(self.source.read_range(info.file, info.begin, info.end))


def tensor_blocks(tensor: PlannedTensor, shards: OpenShards) -> Iterator[memoryview | bytes]:
    """The output bytes of a tensor, in order.

    Raises:
        ConversionError: the source ends early, or a value does not fit the dtype that is asked for.
    """
    if tensor.is_copied:
        yield from shards.blocks(tensor.source)
        return
    info = tensor.source
    rows = info.shape[0] if info.shape else 1
    row_elements = max(1, info.nbytes * 8 // DTYPE_BITS[info.dtype] // max(1, rows))
    row_bytes = row_elements * DTYPE_BITS[info.dtype] // 8
    slab, scales = max(1, _BLOCK_ELEMENTS // row_elements), None
    if tensor.scale is not None and tensor.block_size is not None:
        raw = shards.read_whole(tensor.scale)
        scales = read_scales(raw, tensor.scale)
        slab = -(-slab // tensor.block_size[0]) * tensor.block_size[0]
    for start in range(0, rows, slab):
        stop = min(start + slab, rows)
        raw = shards.read(info, start * row_bytes, stop * row_bytes)
        if not raw:
            continue
        part = torch.frombuffer(raw, dtype=TORCH_DTYPES[info.dtype]).view(stop - start, -1)
        yield _cast(part, start, scales, tensor).view(torch.uint8).numpy().data.cast("B")


def read_scales(raw: bytearray, info: TensorInfo) -> torch.Tensor:
    """The scales of an fp8 weight, in their shape.

    Powers of two (e8m0, one byte of exponent) come as fp32: torch has had a dtype for them since 2.7 only.
    """
    if info.dtype != "F8_E8M0":
        return torch.frombuffer(raw, dtype=TORCH_DTYPES[info.dtype]).view(info.shape)
    codes = torch.frombuffer(raw, dtype=torch.uint8).view(info.shape)
    powers = torch.ldexp(torch.ones(codes.shape), codes.int() - 127)
    return powers.masked_fill(codes == 255, torch.nan)


def _cast(part: torch.Tensor, start: int, scales: torch.Tensor | None, tensor: PlannedTensor) -> torch.Tensor:
    dtype = TORCH_DTYPES[tensor.dtype]
    if scales is not None and tensor.block_size is not None:
        block = tensor.block_size[0]
        rows = scales[start // block : -(-(start + len(part)) // block)]
        result = dequantise_block(part, rows, tensor.block_size, dtype)
    else:
        result = part.to(dtype)
    if dtype == torch.float16 and result.isinf().any() and not part.float().isinf().any():
        raise ConversionError(
            f"{tensor.name} in {tensor.source.file} holds values beyond float16's 65504: use --dtype bfloat16"
        )
    return result
