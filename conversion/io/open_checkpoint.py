"""Open a checkpoint and check that it is whole, from its config and headers: what every verb does before it works.

transformers fills a weight that a checkpoint lacks with random numbers and only logs it. So nothing is loaded,
converted or trained before the files, the index, the headers and the config have been compared with each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...configuration.hub_code import AUTO_MAP
from ...configuration.share_pattern import SharePattern
from ...kernels.block_fp8.block_fp8_format import scale_grid
from ..convert.families import (
    MTP_MARK,
    ExpectedTensor,
    convert_config,
    convert_dense_config,
    expected_indexer,
    expected_tensors,
    indexer_layer,
    is_dense_family,
    layer_of,
    load_config,
)
from .checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo, read_checkpoint
from .fp8 import FP8, SCALE_DTYPES, SCALE_SUFFIX, fp8_block_size, is_fp8
from .sources import ConversionError, FolderSource, Source

# Of new indexers in a dense model, when only the rest of its weights is checked.
_ANY_INDEXER = {"index_topk": 2048, "index_n_heads": 32, "index_head_dim": 128}


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that was found whole.

    Attributes:
        checkpoint: its own config.json, and the headers of its shards.
        fields: the config.json of the same model as an IndexCache checkpoint, running the pattern asked for.
        config: `fields`, checked.
    """

    checkpoint: Checkpoint
    fields: dict[str, Any]
    config: IndexCacheConfig

    @property
    def source(self) -> Source:
        """Where it is read from."""
        return self.checkpoint.source


def open_source(source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Source:
    """The checkpoint that `source` names: a folder here, else a Hub repository.

    Args:
        source: a folder, or a Hub id such as `org/name`.
        revision: branch, tag or commit; for Hub sources alone.
        token: Hub token; the saved login when `None`.

    Raises:
        ConversionError: neither a folder nor a repository, or a revision for a folder.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ConversionError(f"a revision ({revision!r}) belongs to a Hub source, and {source} is a folder")
        return FolderSource(source)
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(source)) and not Path(source).exists():
        from .hub_source import HubSource

        return HubSource(str(source), revision=revision, token=token)
    raise ConversionError(f"{source} is no folder here, nor a Hub id of the form org/name")


def open_checkpoint(
    source: str | os.PathLike[str] | Source,
    pattern: SharePattern | None = None,
    *,
    new_indexers: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> OpenedCheckpoint:
    """Open a DSA or IndexCache checkpoint and check, without loading a tensor, that a model can be made of it.

    Compared are the index with the shards' headers, each header with its file's size, and the config with the
    weights: every tensor that it describes is there, in its shape and in a dtype that can be read, and none is
    beyond it. Weights quantised otherwise than by block fp8 are compared by the modules that they belong to alone.

    Args:
        source: a folder, a Hub id, or what `open_source` made of one.
        pattern: the pattern that the model shall run; the checkpoint's own when `None`.
        new_indexers: full layers may lack their indexers, and dense MLA families are accepted too: what
            `indexcache distill` adds them to.
        revision: branch, tag or commit of a Hub id.
        token: for the Hub; the saved login when `None`.

    Raises:
        ConversionError: naming the file, the tensor, the value and the mend, for every tensor that is missing,
            unknown, or of the wrong shape or dtype, up to a dozen.
    """
    opened = open_source(source, revision=revision, token=token) if isinstance(source, str | os.PathLike) else source
    checkpoint = read_checkpoint(opened)
    check_layer_count(checkpoint)
    location = opened.location
    if new_indexers and is_dense_family(checkpoint.config):
        depth = _layer_count(checkpoint.config, location)
        pattern = pattern or SharePattern.all_full(depth)
        fields = convert_dense_config(checkpoint.config, pattern, _ANY_INDEXER, AUTO_MAP, location)
    else:
        fields = convert_config(checkpoint.config, pattern, None, AUTO_MAP, location)
    config = load_config(fields, location)
    check_weights(checkpoint, config, new_indexers=new_indexers)
    return OpenedCheckpoint(checkpoint, fields, config)


def check_layer_count(checkpoint: Checkpoint) -> None:
    """Compare `num_hidden_layers` with the weights' names, before anything walks over so many layers.

    Raises:
        ConversionError: no number, or more layers than the weights hold.
    """
    location = checkpoint.source.location
    layers = _layer_count(checkpoint.config, location)
    held = 1 + max((place[0] for place in map(layer_of, checkpoint.tensors) if place), default=-1)
    if layers > held:
        raise ConversionError(
            f"{location}: config.json has num_hidden_layers={layers}, and the weights hold {held} layers: "
            "fix the config, or fetch the weights again"
        )


def _layer_count(config: dict[str, Any], location: str) -> int:
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or layers < 1:
        raise ConversionError(f"{location}: config.json has num_hidden_layers={layers!r}: it must be a number")
    return layers


def check_weights(checkpoint: Checkpoint, config: IndexCacheConfig, *, new_indexers: bool = False) -> None:
    """Compare a checkpoint's headers with what `config` asks for.

    Args:
        checkpoint: the headers.
        config: of the model that shall be made of them, with the pattern that it shall run.
        new_indexers: full layers may lack their indexers.

    Raises:
        ConversionError: every missing, unknown, wrong-shaped and wrong-typed tensor by name, up to a dozen.
    """
    location, tensors = checkpoint.source.location, checkpoint.tensors
    _check_size(config, len(tensors), location)
    if not new_indexers:
        _check_indexers_present(config, tensors, location)
    if checkpoint.config.get("quantization_config") is None or is_fp8(checkpoint.config):
        problems = _problems(config, tensors, fp8_block_size(checkpoint.config, location))
    else:
        problems = _lacking_modules(config, tensors)
    if problems:
        raise ConversionError.collect(
            f"{location} does not hold what its config.json describes ({len(problems)} tensors): "
            "fetch it again, or fix the config",
            problems,
        )


def _check_size(config: IndexCacheConfig, held: int, location: str) -> None:
    """Refuse a config that describes far more tensors than there are, before they are listed."""
    sparse = (config.mlp_layer_types or []).count("sparse")
    described = config.num_hidden_layers * 9 + sparse * config.n_routed_experts * 3
    if described > 4 * held + 1000:
        raise ConversionError(
            f"{location}: config.json describes {described:,} tensors or more (num_hidden_layers="
            f"{config.num_hidden_layers}, n_routed_experts={config.n_routed_experts}), and the weights hold {held:,}: "
            "fix the config, or fetch the weights again"
        )


def _check_indexers_present(config: IndexCacheConfig, tensors: Iterable[str], location: str) -> None:
    present = {indexer_layer(name) for name in tensors}
    lacking = [layer for layer in config.share_pattern.full_layers if layer not in present]
    if len(lacking) == config.num_hidden_layers or not present - {None}:
        raise ConversionError(f"{location} holds no indexer weights at all: it is no DSA checkpoint")
    if lacking:
        named = ", ".join(map(str, lacking))
        raise ConversionError(
            f"{location} has no indexer weights in layers {named}, which the pattern {config.index_share_pattern} "
            f"makes full: make them 'S', or convert from a checkpoint that has them"
        )


def _expected(config: IndexCacheConfig, tensors: Iterable[str]) -> dict[str, ExpectedTensor]:
    """What must be there; the indexer of any layer as a whole or not at all."""
    expected = expected_tensors(config)
    layers = {layer for layer in map(indexer_layer, tensors) if layer is not None}
    for layer in sorted(layer for layer in layers if layer < config.num_hidden_layers):
        expected |= expected_indexer(config, layer)
    return expected


def _lacking_modules(config: IndexCacheConfig, tensors: dict[str, TensorInfo]) -> list[str]:
    """What is missing of a checkpoint whose weights have other names and shapes: modules without any tensor."""
    held = {name[:at] for name in tensors for at in range(len(name)) if name[at] == "."}
    modules = dict.fromkeys(name.rpartition(".")[0] for name in _expected(config, tensors))
    return [f"{module} is missing" for module in modules if module not in held]


def _problems(
    config: IndexCacheConfig, tensors: dict[str, TensorInfo], block_size: tuple[int, int] | None
) -> list[str]:
    """What is missing, unknown or of the wrong shape or dtype, one sentence a tensor."""
    layers = config.num_hidden_layers
    expected = _expected(config, tensors)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    if config.tie_word_embeddings:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    extra_layers = {place[0] for place in map(layer_of, tensors) if place and place[0] >= layers}
    plain = {layer for layer in extra_layers if f"model.layers.{layer}.{MTP_MARK}" not in tensors}
    problems += [
        f"layer {layer} is beyond num_hidden_layers={layers} and no MTP layer (it has no {MTP_MARK})"
        for layer in sorted(plain)
    ]
    for name, info in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            problems += _scale_problems(info, tensors.get(name.removesuffix(SCALE_SUFFIX)), block_size)
            continue
        place = layer_of(name)
        if place and place[0] >= layers:
            quantisable = True
        elif name not in expected:
            problems.append(f"{name} ({info.dtype} {list(info.shape)} in {info.file}) is not known to this family")
            continue
        else:
            problems += _shape_problems(info, expected[name])
            quantisable = expected[name].quantisable
        problems += _dtype_problems(info, quantisable, tensors, block_size)
    return problems


def _shape_problems(info: TensorInfo, expected: ExpectedTensor) -> list[str]:
    if info.shape == expected.shape:
        return []
    return [f"{info.name} in {info.file} has shape {list(info.shape)}, and the config asks for {list(expected.shape)}"]


def _dtype_problems(
    info: TensorInfo, quantisable: bool, tensors: dict[str, TensorInfo], block_size: tuple[int, int] | None
) -> list[str]:
    if info.dtype in FLOAT_DTYPES:
        return []
    where = f"{info.name} in {info.file} has dtype {info.dtype}"
    if info.dtype != FP8 or not quantisable:
        return [f"{where}, and {' or '.join((*FLOAT_DTYPES, FP8) if quantisable else FLOAT_DTYPES)} is accepted here"]
    if block_size is None:
        return [f"{where}, and config.json has no quantization_config: add the one it was published with"]
    if info.name + SCALE_SUFFIX not in tensors:
        return [f"{where} without its scales: {info.name + SCALE_SUFFIX} is missing"]
    return []


def _scale_problems(info: TensorInfo, weight: TensorInfo | None, block_size: tuple[int, int] | None) -> list[str]:
    if weight is None or weight.dtype != FP8 or len(weight.shape) != 2:
        state = "missing" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        return [
            f"{info.name} in {info.file} scales an fp8 matrix, and {info.name.removesuffix(SCALE_SUFFIX)} is {state}"
        ]
    problems = []
    if block_size is not None and info.shape != (grid := scale_grid(*weight.shape, block_size)):
        problems.append(
            f"{info.name} in {info.file} has shape {list(info.shape)}, and a weight of shape {list(weight.shape)} in "
            f"blocks of {block_size[0]} x {block_size[1]} needs {list(grid)}"
        )
    if info.dtype not in SCALE_DTYPES:
        problems.append(
            f"{info.name} in {info.file} has dtype {info.dtype}, and {' or '.join(SCALE_DTYPES)} is needed"
        )
    return problems
