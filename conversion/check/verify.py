"""Prove that a converted checkpoint holds its source's tensors, byte for byte, and computes the same logits."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...configuration.configuration_indexcache import PATTERN_FIELDS
from ...configuration.hub_code import AUTO_MAP
from ...configuration.share_pattern import SharePattern
from ..convert.families import INDEXCACHE, LOCAL_FIELDS, convert_config, indexer_layer, load_config, source_pattern
from ..convert.journal import RECIPE_FILE
from ..convert.plan import CAST_DTYPES
from ..io.checkpoint import Checkpoint, TensorInfo, read_checkpoint, read_json
from ..io.fp8 import FP8, SCALE_SUFFIX, fp8_block_size
from ..io.open_checkpoint import check_layer_count, open_checkpoint
from ..io.sources import ConversionError, FolderSource, Source
from ..io.tensor_stream import OpenShards, PlannedTensor, tensor_blocks

# What conversion rewrites in config.json on purpose (the pattern is compared with the recipe), and versions.
_REWRITTEN_FIELDS = {
    *PATTERN_FIELDS,
    *LOCAL_FIELDS,
    "model_type",
    "architectures",
    "auto_map",
    "indexcache_version",
    "transformers_version",
}
_CAST_FIELDS = {"dtype", "quantization_config"}


@dataclass
class Verification:
    """What `verify` found. `ok` is the verdict; every difference and every warning is a sentence.

    `not_compared` names the checks that were not made, whose reasons are among the warnings.
    """

    pattern: str
    tensors_equal: int = 0
    bytes_equal: int = 0
    tensors_cast: int = 0
    indexers_dropped: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    logits: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing that was compared differs where it should not."""
        return not self.differences

    @property
    def verdict(self) -> str:
        """In words; what was not compared does not pass."""
        if not self.ok:
            return "not verified"
        return f"verified, but NOT COMPARED: {', '.join(self.not_compared)}" if self.not_compared else "verified"


def verify(original: Source, converted: Source, *, compare_logits: bool = True) -> Verification:
    """Compare a converted checkpoint with its source.

    Every tensor of the source must be in the converted checkpoint under its name, with its shape, dtype and bytes;
    only the indexers of layers that its pattern shares may be absent. Where the conversion's recipe says that it cast
    the weights, they must equal the cast repeated here. The bytes are streamed. Configs are compared by what they
    mean to the model, however they spell it, and the pattern with the recipe's.

    Args:
        original: the checkpoint that was converted.
        converted: what it became.
        compare_logits: also run both models on fixed tokens, the source's weights with the converted one's pattern,
            when they fit into this machine's memory.

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
    if len(pattern) != before.config["num_hidden_layers"]:
        raise ConversionError(
            f"{converted.location} has {len(pattern)} layers and {original.location} "
            f"{before.config['num_hidden_layers']}: they are not of one model"
        )
    result = Verification(pattern.letters)
    recipe = read_json(converted, RECIPE_FILE) if RECIPE_FILE in after.files else {}
    cast_to = CAST_DTYPES.get(str(recipe.get("dtype")))
    _compare_recipe(after, pattern, recipe, result)
    _compare_names(before, after, pattern, cast_to, result)
    _compare_bytes(before, after, cast_to, result)
    _compare_configs(before, after, pattern, cast_to is not None, result)
    _compare_logits(before, after, pattern, compare_logits, result)
    return result


def _compare_recipe(after: Checkpoint, pattern: SharePattern, recipe: dict[str, Any], result: Verification) -> None:
    """The pattern is the one that was asked for, and shared indexers are there only where that was asked for."""
    written = recipe.get("index_share_pattern")
    if written is None:
        result.not_compared.append("pattern")
        result.warnings.append(
            f"pattern not compared: there is no {RECIPE_FILE} that says which pattern the conversion was asked for"
        )
    elif written != pattern.letters:
        result.differences.append(
            f"the pattern is {written} in the recipe of the conversion and {pattern} in config.json"
        )
    if recipe.get("keep_shared_indexers") is False:
        held = {indexer_layer(name) for name in after.tensors}
        kept = [layer for layer in pattern.shared_layers if layer in held]
        if kept:
            result.differences.append(
                f"layers {', '.join(map(str, kept))} are shared and hold indexer weights, which the recipe of the "
                "conversion says it dropped"
            )


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


def _compare_configs(
    before: Checkpoint, after: Checkpoint, pattern: SharePattern, is_cast: bool, result: Verification
) -> None:
    location = before.source.location
    want = _meaning(convert_config(before.config, pattern, None, AUTO_MAP, location), location)
    found = _meaning(after.config, after.source.location)
    ignored = _REWRITTEN_FIELDS | (_CAST_FIELDS if is_cast else set())
    for name in sorted(set(want) | set(found)):
        if name.partition(".")[0] not in ignored and want.get(name) != found.get(name):
            result.differences.append(
                f"config.json: {name} is {want.get(name)!r} in the source and {found.get(name)!r} now"
            )


def _meaning(fields: dict[str, Any], location: str) -> dict[str, Any]:
    """A config's fields as the model reads them: `rope_scaling` and `rope_parameters` are one, defaults spelled out.

    Fields of a nested object have its name before theirs.
    """
    read = load_config(fields, location).to_dict()
    read["quantization_config"] = fields.get("quantization_config")
    flat: dict[str, Any] = {}
    for name, value in read.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": part for inner, part in value.items()}
        else:
            flat[name] = value
    # The older spelling of rope_type, which stays beside it.
    flat.pop("rope_parameters.type", None)
    return flat


def _compare_logits(
    before: Checkpoint, after: Checkpoint, pattern: SharePattern, wanted: bool, result: Verification
) -> None:
    result.logits = _run_logits(before, after, pattern, wanted)
    logits = result.logits
    if "failed" in logits:
        result.differences.append(f"the converted checkpoint does not run: {logits['failed']}")
    elif not logits["compared"]:
        result.not_compared.append("logits")
        result.warnings.append(f"logits not compared: {logits['reason']}")
    elif not logits["agree"]:
        result.differences.append(
            f"the logits differ by {logits['median_abs_difference']:.3g} at the median token "
            f"(KL {logits['mean_kl']:.3g}), although both run the pattern {pattern}"
        )
    if "reference_note" in logits:
        result.warnings.append(f"the source's weights were run by IndexCacheForCausalLM: {logits['reference_note']}")
    if "index_topk_lowered_from" in logits:
        result.warnings.append(
            f"logits compared with index_topk={logits['index_topk']} on both sides, lowered from "
            f"{logits['index_topk_lowered_from']}, so that indexers choose among {logits['tokens']} tokens"
        )


def _run_logits(before: Checkpoint, after: Checkpoint, pattern: SharePattern, wanted: bool) -> dict[str, Any]:
    from .logits_comparison import compare_logits

    if not wanted:
        return {"compared": False, "reason": "not asked for"}
    if not isinstance(before.source, FolderSource) or not isinstance(after.source, FolderSource):
        return {"compared": False, "reason": "both checkpoints must be folders on this machine"}
    return compare_logits(before, after, pattern)
