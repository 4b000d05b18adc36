"""Prove that a converted checkpoint holds its source's tensors, byte for byte, and computes the same logits."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..configuration.configuration_indexcache import PATTERN_FIELDS
from ..configuration.share_pattern import SharePattern
from .checkpoint import Checkpoint, ConversionError, FolderSource, Source, TensorInfo, read_checkpoint, read_json
from .families import INDEXCACHE, indexer_layer, source_pattern
from .fp8 import FP8, SCALE_SUFFIX, fp8_block_size
from .journal import RECIPE_FILE
from .open_checkpoint import check_layer_count, open_checkpoint
from .plan import CAST_DTYPES, PlannedTensor
from .tensor_stream import OpenShards, tensor_blocks

# What conversion rewrites in config.json on purpose.
_REWRITTEN_FIELDS = {
    *PATTERN_FIELDS,
    "model_type",
    "architectures",
    "auto_map",
    "source_model_type",
    "indexcache_version",
}
_CAST_FIELDS = {"dtype", "torch_dtype", "quantization_config"}


@dataclass
class Verification:
    """What `verify` found. `ok` is the verdict; every difference is a sentence."""

    pattern: str
    tensors_equal: int = 0
    bytes_equal: int = 0
    tensors_cast: int = 0
    indexers_dropped: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    logits: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing differs that should not."""
        return not self.differences


def verify(original: Source, converted: Source, *, compare_logits: bool = True) -> Verification:
    """Compare a converted checkpoint with its source.

    Every tensor of the source must be in the converted checkpoint under its name, with its shape, dtype and bytes;
    only the indexers of layers that its pattern shares may be absent. Where the conversion's recipe says that it cast
    the weights, they must equal the cast repeated here. The bytes are streamed.

    Args:
        original: the checkpoint that was converted.
        converted: what it became.
        compare_logits: also run both models on fixed tokens, when both fit into this machine's memory.

    Raises:
        ConversionError: one of the two cannot be read, or the second is no IndexCache checkpoint.
    """
    before, after = open_checkpoint(original).checkpoint, read_checkpoint(converted)
    if after.config.get("model_type") != INDEXCACHE:
        raise ConversionError(
            f"{converted.location} has model_type {after.config.get('model_type')!r}: give the source first and the "
            f"{INDEXCACHE} checkpoint second"
        )
    check_layer_count(after)
    pattern = source_pattern(after.config, converted.location)
    result = Verification(pattern.letters)
    recipe = read_json(converted, RECIPE_FILE) if RECIPE_FILE in after.files else {}
    cast_to = CAST_DTYPES.get(str(recipe.get("dtype")))
    _compare_names(before, after, pattern, cast_to, result)
    _compare_bytes(before, after, cast_to, result)
    _compare_configs(before.config, after.config, cast_to is not None, result)
    if compare_logits:
        _compare_logits(before, after, pattern, result)
    return result


def _compare_names(
    before: Checkpoint, after: Checkpoint, pattern: SharePattern, cast_to: str | None, result: Verification
) -> None:
    old, new = before.tensors, after.tensors
    dropped = set()
    for name in old:
        if name in new:
            continue
        layer = indexer_layer(name)
        if layer is not None and layer in pattern.shared_layers:
            dropped.add(layer)
        elif not (cast_to and name.endswith(SCALE_SUFFIX)):
            result.differences.append(f"{name} is missing from the converted checkpoint")
    result.differences += [f"{name} is not in the source" for name in new if name not in old]
    result.indexers_dropped = sorted(dropped)


def _compare_bytes(before: Checkpoint, after: Checkpoint, cast_to: str | None, result: Verification) -> None:
    old = before.tensors
    block_size = fp8_block_size(before.config, before.source.location)
    held_old, held_new = OpenShards(before.source), OpenShards(after.source)
    try:
        for file, shard in after.shards.items():
            pairs = [(old[name], info) for name, info in shard.tensors.items() if name in old]
            files = list(dict.fromkeys(one.file for one, _ in pairs))
            same_file = len(files) == 1 and _is_same_file(before.source, files[0], after.source, file)
            if not same_file:
                held_old.hold(files)
                held_new.hold([file])
            for one, other in pairs:
                problem = _mismatch(one, other, cast_to)
                if problem is None and not (same_file and one.begin == other.begin):
                    scale = old.get(one.name + SCALE_SUFFIX) if other.dtype != FP8 else None
                    planned = PlannedTensor(one, other.dtype, scale, block_size if scale else None)
                    problem = _first_difference(planned, other, held_old, held_new)
                if problem is not None:
                    result.differences.append(f"{one.name} {problem}")
                    continue
                result.tensors_equal += 1
                result.bytes_equal += other.nbytes
                result.tensors_cast += one.dtype != other.dtype
        held_old.hold([])
        held_new.hold([])
    finally:
        held_old.abandon()
        held_new.abandon()


def _mismatch(one: TensorInfo, other: TensorInfo, cast_to: str | None) -> str | None:
    if one.shape != other.shape:
        return f"has shape {list(one.shape)} in the source and {list(other.shape)} in {other.file}"
    if one.dtype != other.dtype and other.dtype != cast_to:
        return f"has dtype {one.dtype} in the source and {other.dtype} in {other.file}"
    return None


def _is_same_file(source: Source, file: str, other: Source, other_file: str) -> bool:
    """Hard links to one file need no reading."""
    if not isinstance(source, FolderSource) or not isinstance(other, FolderSource):
        return False
    return os.path.samefile(source.path(file), other.path(other_file))


def _first_difference(
    planned: PlannedTensor, other: TensorInfo, held_old: OpenShards, held_new: OpenShards
) -> str | None:
    offset = 0
    for block in tensor_blocks(planned, held_old):
        want = np.frombuffer(block, dtype=np.uint8)
        found = np.frombuffer(held_new.read(other, offset, offset + len(want)), dtype=np.uint8)
        if not np.array_equal(want, found):
            at = offset + int(np.flatnonzero(want != found)[0])
            return f"differs from the source at byte {at} of {other.nbytes} (in {other.file})"
        offset += len(want)
    return None


def _compare_configs(before: dict[str, Any], after: dict[str, Any], is_cast: bool, result: Verification) -> None:
    ignored = _REWRITTEN_FIELDS | (_CAST_FIELDS if is_cast else set())
    for name, value in before.items():
        if name not in ignored and after.get(name) != value:
            result.differences.append(f"config.json: {name} is {value!r} in the source and {after.get(name)!r} now")


def _compare_logits(before: Checkpoint, after: Checkpoint, pattern: SharePattern, result: Verification) -> None:
    """Logits decide only where both models choose keys alike: with equal patterns."""
    from .logits_comparison import compare_logits, pattern_run_by

    if not isinstance(before.source, FolderSource) or not isinstance(after.source, FolderSource):
        result.logits = {"compared": False, "reason": "both checkpoints must be folders on this machine"}
        return
    result.logits = compare_logits(before, after)
    result.logits["same_pattern"] = pattern_run_by(before) == pattern
    if result.logits["same_pattern"] and result.logits.get("agree") is False:
        result.differences.append(
            f"the logits differ by {result.logits['median_abs_difference']:.3g} at the median token "
            f"(KL {result.logits['mean_kl']:.3g}), although both run the pattern {pattern}"
        )
