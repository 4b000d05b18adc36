"""Read a safetensors checkpoint by its headers: what tensors it has, where their bytes lie, what is wrong with it.

Nothing here loads a tensor. The file format: 8 bytes of header length (little endian), a JSON header padded with
spaces, the tensors' bytes without holes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass, field
from typing import Any

from .sources import ConversionError, Source, check_file_name
from .strict_json import parse_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
# What peft calls the description of an adapter.
ADAPTER_FILE = "adapter_config.json"

# Bits an element, by the name that safetensors headers use.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOAT_DTYPES = ("BF16", "F16", "F32")
# The same limit as the safetensors library's: a longer header is damage, not data.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a shard's header describes it; `begin` and `end` are offsets in the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.begin


@dataclass(frozen=True)
class ShardHeader:
    """A shard's header: its tensors in the order of their bytes, its `__metadata__`, and its size on disk."""

    file: str
    size: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] | None


def read_json(source: Source, file: str) -> dict[str, Any]:
    """A JSON object from a small file; ConversionError when it is absent, unreadable or names a key twice."""
    where = f"{source.location}: {file}"
    raw = source.read_range(file, 0, source.size(file))
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise ConversionError(f"{where} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{where} holds a {type(value).__name__} where a JSON object belongs")
    return value


def read_header(source: Source, file: str) -> ShardHeader:
    """Read and check a shard's header.

    Raises:
        ConversionError: no safetensors file, a damaged header, offsets that overlap or leave holes, a shape that
            does not fit its bytes, or a file shorter or longer than its header says.
    """
    where, size = f"{source.location}: {file}", source.size(file)
    start = source.read_range(file, 0, 8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER_BYTES:
        raise ConversionError(f"{where} is no safetensors file (its first 8 bytes are {start.hex()}): fetch it again")
    if 8 + length > size:
        raise ConversionError(
            f"{where} is truncated: its header alone needs {8 + length} bytes and the file has {size}: fetch it again"
        )
    try:
        header = parse_json(source.read_range(file, 8, 8 + length))
        metadata = _checked_metadata(header)
        tensors = [_tensor_info(name, file, entry, 8 + length) for name, entry in header.items()]
    except ValueError as error:
        raise ConversionError(f"{where} has a damaged safetensors header ({error}): fetch it again") from error
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != end:
            raise ConversionError(
                f"{where} has a damaged safetensors header: {tensor.name} begins at byte {tensor.begin} "
                f"where {end} was due: fetch it again"
            )
        end = tensor.end
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise ConversionError(f"{where} is {state}: {end} bytes were due and the file has {size}: fetch it again")
    ordered = sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end))
    return ShardHeader(file, size, {tensor.name: tensor for tensor in ordered}, metadata)


def _checked_metadata(header: Any) -> dict[str, str] | None:
    """Take `__metadata__` out of a header: text by name, as the safetensors library demands; ValueError otherwise."""
    if not isinstance(header, dict):
        raise ValueError("it is no JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        return None
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no object of strings")
    return metadata


def _tensor_info(name: str, file: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    """One header entry, checked; ValueError for the caller to place."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is no JSON object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    shape, offsets = _naturals(name, entry, "shape"), _naturals(name, entry, "data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has data_offsets {offsets!r}")
    begin, end = offsets
    if any(side >> 64 for side in itertools.accumulate(shape, operator.mul)) or any(side >> 64 for side in shape):
        raise ValueError(f"{name} has shape {shape}, which is beyond 64 bits")
    if math.prod(shape) * DTYPE_BITS[dtype] != (end - begin) * 8:
        raise ValueError(f"{name} has {end - begin} bytes, which {dtype} {shape} does not fill")
    return TensorInfo(name, file, dtype, tuple(shape), data_start + begin, data_start + end)


def _naturals(name: str, entry: dict[str, Any], key: str) -> list[int]:
    value = entry.get(key)
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        raise ValueError(f"{name} has {key} {value!r}")
    return value


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's config and headers. `shards` stand in the order of their names."""

    source: Source
    config: dict[str, Any]
    shards: dict[str, ShardHeader]
    is_sharded: bool
    files: list[str] = field(repr=False)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors, shard by shard, each shard's in the order of their bytes."""
        return {name: info for shard in self.shards.values() for name, info in shard.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for shard in self.shards.values() for info in shard.tensors.values())

    @property
    def stray_weights(self) -> list[str]:
        """Weight files that the checkpoint does not name and conversion leaves behind."""
        suffixes = (".safetensors", ".bin", ".pt", ".pth")
        return [file for file in self.files if file.endswith(suffixes) and file not in self.shards]


def read_checkpoint(source: Source) -> Checkpoint:
    """Read config, index and every shard's header, and check that they agree.

    Raises:
        ConversionError: naming the file, the tensor, the value and the mend.
    """
    files = source.list_files()
    _refuse_adapters(source, files)
    config = read_json(source, CONFIG_FILE)
    if INDEX_FILE in files and SINGLE_FILE in files:
        raise ConversionError(
            f"{source.location} holds both {SINGLE_FILE} and {INDEX_FILE}, and loaders differ in which they take: "
            "remove the stale one"
        )
    if INDEX_FILE not in files:
        if SINGLE_FILE not in files:
            raise ConversionError(_why_no_weights(source, files))
        return Checkpoint(source, config, {SINGLE_FILE: read_header(source, SINGLE_FILE)}, False, files)
    weight_map = read_json(source, INDEX_FILE).get("weight_map")
    where = f"{source.location}: {INDEX_FILE}"
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{where} has no weight_map: fetch it again")
    for name, file in weight_map.items():
        check_file_name(file, f"{where} (tensor {name})")
        if "/" in file or not file.endswith(".safetensors"):
            raise ConversionError(
                f"{where}: {name} is said to be in {file!r}, which is no .safetensors file beside it"
            )
    absent = sorted(set(weight_map.values()) - set(files))
    if absent:
        raise ConversionError.collect(f"{where} names shards that are not there: fetch them, or fix the index", absent)
    shards = {file: read_header(source, file) for file in sorted(set(weight_map.values()))}
    _check_index(where, weight_map, shards)
    return Checkpoint(source, config, shards, True, files)


def _refuse_adapters(source: Source, files: list[str]) -> None:
    """Transformers applies an adapter beside the weights where peft is installed, and only there."""
    if ADAPTER_FILE in files:
        raise ConversionError(
            f"{source.location} holds an adapter ({ADAPTER_FILE}) beside its weights, and would be one model with "
            "peft installed and another without: merge it into the weights (peft's merge_and_unload), or move "
            f"{ADAPTER_FILE} away to leave it out"
        )


def _check_index(where: str, weight_map: dict[str, str], shards: dict[str, ShardHeader]) -> None:
    """Every tensor lies in exactly the shard that the index names."""
    problems = [
        f"{name} is said to be in {file}, which does not hold it"
        for name, file in weight_map.items()
        if name not in shards[file].tensors
    ]
    home: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in home:
                problems.append(f"{name} is in two shards, {home[name]} and {file}")
            elif name not in weight_map:
                problems.append(f"{file} holds {name}, which the index does not name")
            home.setdefault(name, file)
    if problems:
        raise ConversionError.collect(f"{where} and the shards disagree: fix the index or fetch it again", problems)


def _why_no_weights(source: Source, files: list[str]) -> str:
    loose = [file for file in files if file.endswith(".safetensors")]
    if loose:
        return (
            f"{source.location} holds {len(loose)} .safetensors files (the first: {loose[0]}) and no {INDEX_FILE}: "
            "fetch the index"
        )
    if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        return f"{source.location} holds pickled weights: save the checkpoint as safetensors first"
    return f"{source.location} holds neither {SINGLE_FILE} nor {INDEX_FILE}: give a folder with a checkpoint's weights"
