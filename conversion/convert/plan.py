"""Plan a conversion on headers alone: every source tensor is kept, dropped, folded into its weight, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...configuration.hub_code import AUTO_MAP
from ...configuration.share_pattern import SharePattern
from ..io.checkpoint import DTYPE_BITS, FLOAT_DTYPES, SINGLE_FILE, Checkpoint, TensorInfo
from ..io.fp8 import FP8, SCALE_SUFFIX, fp8_block_size
from ..io.open_checkpoint import check_layer_count, check_weights
from ..io.shard_writer import OutputShard
from ..io.sources import ConversionError
from ..io.tensor_stream import PlannedTensor
from .companion_files import Companion, plan_companions
from .families import INDEXER, LOCAL_FIELDS, convert_config, indexer_layer, load_config, source_pattern

CAST_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Plan:
    """All that a conversion will do to the weights and the config."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    pattern: SharePattern
    shards: tuple[OutputShard, ...]
    dropped: tuple[TensorInfo, ...]
    folded: tuple[TensorInfo, ...]
    has_index: bool
    companions: tuple[Companion, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def rewritten_to_drop(self) -> int:
        """Bytes of shards that are written anew for no other reason than the indexers dropped from them."""
        dropped_from = {info.file for info in self.dropped}
        return sum(
            shard.nbytes
            for shard in self.shards
            if shard.file in dropped_from
            and shard.source_files == [shard.file]
            and all(tensor.is_copied for tensor in shard.tensors)
        )

    @property
    def weight_map(self) -> dict[str, str]:
        """The output's tensors with their files."""
        return {tensor.name: shard.file for shard in self.shards for tensor in shard.tensors}

    @property
    def vanished_files(self) -> list[str]:
        """Source shards of which nothing is left under their name."""
        return sorted(set(self.checkpoint.shards) - {shard.file for shard in self.shards})


def build_plan(
    checkpoint: Checkpoint,
    pattern: SharePattern | None = None,
    *,
    dtype: str = "auto",
    max_shard_size: int | None = None,
    keep_shared_indexers: bool = False,
) -> Plan:
    """Check a source against its family, and the files that come along, and lay out the output.

    Args:
        checkpoint: the source's config and headers.
        pattern: the pattern to write; the source's own when `None`.
        dtype: `auto` leaves every byte as it is; `bfloat16`, `float16` or `float32` casts and dequantises.
        max_shard_size: re-shard to files of at most so many bytes of tensors; the source's sharding when `None`.
        keep_shared_indexers: keep the indexer weights of shared layers, so that they can run again later.

    Raises:
        ConversionError: every missing, unknown, wrong-shaped and wrong-typed tensor by name, and every other reason
            why the source cannot become what is asked for.
    """
    location = checkpoint.source.location
    if dtype not in ("auto", *CAST_DTYPES):
        raise ConversionError(f"dtype {dtype!r} is not known: choose auto, {', '.join(CAST_DTYPES)}")
    cast_to = None if dtype == "auto" else dtype
    block_size = fp8_block_size(checkpoint.config, location)
    check_layer_count(checkpoint)
    fields = convert_config(checkpoint.config, pattern, cast_to, AUTO_MAP, location)
    config = load_config(fields, location)
    tensors = checkpoint.tensors
    check_weights(checkpoint, config)

    shared = set() if keep_shared_indexers else set(config.share_pattern.shared_layers)
    dropped = tuple(info for name, info in tensors.items() if indexer_layer(name) in shared)
    gone = {info.name for info in dropped}
    folded, planned = [], {}
    for name, info in tensors.items():
        if name in gone:
            continue
        if cast_to and name.endswith(SCALE_SUFFIX):
            folded.append(info)
            continue
        target = _target_dtype(info, CAST_DTYPES[cast_to]) if cast_to else info.dtype
        scale = tensors.get(name + SCALE_SUFFIX) if target != info.dtype and info.dtype == FP8 else None
        planned[name] = PlannedTensor(info, target, scale, block_size if scale else None)

    companions, notes = plan_companions(checkpoint.source)
    if max_shard_size is None:
        shards, has_index = _shards_as_in_source(checkpoint, planned), checkpoint.is_sharded
    else:
        shards = _shards_of_size(list(planned.values()), max_shard_size)
        has_index = len(shards) > 1
    return Plan(
        checkpoint,
        fields,
        config.share_pattern,
        tuple(shards),
        dropped,
        tuple(folded),
        has_index,
        tuple(companions),
        (*_warnings(checkpoint, config), *notes),
    )


def _warnings(checkpoint: Checkpoint, config: IndexCacheConfig) -> list[str]:
    warnings = []
    before = source_pattern(checkpoint.config, checkpoint.source.location)
    revived = [layer for layer in config.share_pattern.full_layers if not before.is_full(layer)]
    if revived:
        warnings.append(
            f"layers {', '.join(map(str, revived))} are shared in the source and full in the output: "
            "their indexers may never have been trained to run"
        )
    local = {name: checkpoint.config[name] for name in sorted(LOCAL_FIELDS & set(checkpoint.config))}
    if local:
        named = ", ".join(f"{name}={value!r}" for name, value in local.items())
        warnings.append(f"config.json: what names code or places of the source's owner stays behind: {named}")
    if checkpoint.stray_weights:
        warnings.append(f"weight files that the checkpoint does not name stay behind: {checkpoint.stray_weights}")
    return warnings


# ---- layout -------------------------------------------------------------------------------------------------------


def _target_dtype(info: TensorInfo, target: str) -> str:
    """The dtype after a cast: transformers keeps the router's bias, and the indexer's head weights in fp16, wider."""
    if info.dtype == FP8:
        return target
    if info.dtype not in FLOAT_DTYPES or info.name.endswith(".e_score_correction_bias"):
        return info.dtype
    if target == "F16" and info.name.endswith(f"{INDEXER}weights_proj.weight"):
        return info.dtype
    return target


def _widest_first(tensors: Iterable[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    """The order of bytes in a written shard: each tensor is then aligned to its element's size, without holes."""
    return tuple(sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype]))


def _shards_as_in_source(checkpoint: Checkpoint, planned: dict[str, PlannedTensor]) -> list[OutputShard]:
    shards = []
    for file, header in checkpoint.shards.items():
        kept = [planned[name] for name in header.tensors if name in planned]
        whole = len(kept) == len(header.tensors) and all(tensor.is_copied for tensor in kept)
        if kept:
            shards.append(OutputShard(file, tuple(kept) if whole else _widest_first(kept), header.metadata, whole))
    return shards


def _shards_of_size(planned: list[PlannedTensor], max_bytes: int) -> list[OutputShard]:
    """Tensors in source order, as many to a file as fit; one larger than the limit has a file of its own."""
    files: list[list[PlannedTensor]] = []
    filled = 0
    for tensor in planned:
        if not files or filled + tensor.nbytes > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += tensor.nbytes
    metadata = {"format": "pt"}
    if len(files) == 1:
        return [OutputShard(SINGLE_FILE, _widest_first(files[0]), metadata, False)]
    return [
        OutputShard(f"model-{i:05d}-of-{len(files):05d}.safetensors", _widest_first(tensors), metadata, False)
        for i, tensors in enumerate(files, start=1)
    ]
