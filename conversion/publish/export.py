"""Export an IndexCache checkpoint for another engine: the same weights, the config spelled as that engine reads it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...configuration.configuration_indexcache import PATTERN_FIELDS, IndexCacheConfig
from ..convert.companion_files import copy_companions
from ..convert.families import INDEXCACHE, ROUTER, check_router, family_of, load_config
from ..convert.journal import check_apart
from ..convert.pattern_file import read_pattern_file
from ..io.checkpoint import CONFIG_FILE, INDEX_FILE, read_checkpoint, read_json
from ..io.open_checkpoint import check_layer_count, check_weights
from ..io.shard_writer import DiskFullError, pass_whole, sync_folder, write_json
from ..io.sources import ConversionError, FolderSource, check_file_name, refuse_pipes
from .card import write_export_card
from .export_engines import ENGINES, Contents, engine_named

__all__ = ["ENGINES", "STAGING_FOLDER", "export", "export_pattern"]

STAGING_FOLDER = ".indexcache_export"
_PLACED_FILE = ".indexcache_export.json"

# Our switches that no source family has: each engine has this value built in, so another cannot be exported.
_BUILT_IN = (
    "mla_norm_eps",
    "index_k_norm_eps",
    "masked_group_score",
    "attention_output_gate",
    "shared_experts_intermediate_size",
    "rope_interleave",
)
# `rope_interleave` some sources spell themselves.
_OURS = {
    *PATTERN_FIELDS,
    *(name for name in _BUILT_IN if name != "rope_interleave"),
    "indexer_fp8",
    "head_dim",
    "layer_types",
    "source_model_type",
    "indexcache_version",
    "auto_map",
    "architectures",
    "model_type",
}


def export(path: str | os.PathLike[str], output: str | os.PathLike[str], to: str) -> Path:
    """Write a checkpoint folder that another engine serves with the same weights and the same sharing.

    Weight files are linked where the file system can, else copied; their names on disk are the source family's own,
    which every engine reads. The config holds every field that the engine reads (`ENGINES`), so that none is left to
    its default. The pattern is always spelled layer by layer, except for Megatron, which has no such field.

    Args:
        path: an IndexCache checkpoint of the family `deepseek_v32`, `glm_moe_dsa` or `axk2`.
        output: the folder to write; absent or empty, or what a killed export left. An export that fails leaves
            nothing in it.
        to: `vllm`, `sglang`, `trtllm`, `transformers` or `megatron`.

    Returns:
        The output folder.

    Raises:
        ConversionError: unknown engine, a pattern, switch or surplus indexer that it cannot run, a source that is
            damaged or lacks weights, or an output that is taken.
    """
    output = Path(output)
    engine = engine_named(to)
    source = FolderSource(path)
    check_apart(source.folder, output)
    checkpoint = read_checkpoint(source)
    fields = _native_fields(checkpoint.config, str(path))
    ours = load_config(checkpoint.config, str(path))
    check_layer_count(checkpoint)
    check_weights(checkpoint, ours)
    pattern = ours.share_pattern
    contents = Contents.of(checkpoint, pattern)
    config = engine.config(fields, ours, contents, str(path))
    card = None
    if "README.md" in checkpoint.files:
        card = source.read_range("README.md", 0, source.size("README.md")).decode("utf-8", errors="replace")
    with _staged(output) as stage:
        copy_companions(source, stage)
        for file in checkpoint.shards:
            pass_whole(source.path(file), stage / file)
        write_export_card(stage, source_card=card, pattern=pattern, engine=to)
        if checkpoint.is_sharded:
            write_json(stage / INDEX_FILE, read_json(source, INDEX_FILE))
        write_json(stage / CONFIG_FILE, config)
    return output


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder in `output` whose files take their places, config last, when the block ends well; else all is undone.

    A killed export leaves that folder or the list of what it was putting in place: the next one undoes it first. The
    list goes last, at once: without it, and without the folder, an export is whole.
    """
    stage = output / STAGING_FOLDER
    created = not output.exists()
    if not created:
        if output.is_dir():
            refuse_pipes(output)
        _undo_killed_export(output)
        if not output.is_dir() or any(output.iterdir()):
            raise ConversionError(f"the output {output} exists and is not empty: give another folder")
    try:
        stage.mkdir(parents=True)
        yield stage
        names = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file())
        # At once: nothing else of this export lies in the output yet.
        write_json(stage / _PLACED_FILE, names)
        os.replace(stage / _PLACED_FILE, output / _PLACED_FILE)
        for name in sorted(names, key=lambda name: name == CONFIG_FILE):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, output / name)
        sync_folder(output)
        shutil.rmtree(stage)
        (output / _PLACED_FILE).unlink()
    except BaseException as error:
        with suppress(OSError):
            _undo_killed_export(output)
            if created:
                output.rmdir()
        if isinstance(error, DiskFullError):
            raise ConversionError(
                f"the disk of {output} is full and nothing of the export is left: make room, or give an output on the "
                "checkpoint's own disk, where weights are linked; then export again"
            ) from error
        raise


def _undo_killed_export(output: Path) -> None:
    """Remove what an export that did not end has written to `output`, and nothing else."""
    stage, listing = output / STAGING_FOLDER, output / _PLACED_FILE
    is_staged = stage.is_dir() and not stage.is_symlink()
    if not is_staged and not listing.is_file():
        return
    try:
        placed = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        placed = []
    # The config first: what is left of it in between must not load as a model.
    for name in sorted(map(str, placed), key=lambda name: name != CONFIG_FILE):
        path = output / check_file_name(name, str(listing))
        path.unlink(missing_ok=True)
        for folder in path.relative_to(output).parents:
            with suppress(OSError):
                if folder != Path():
                    (output / folder).rmdir()
    if is_staged:
        shutil.rmtree(stage)
    listing.unlink(missing_ok=True)


def export_pattern(
    path: str | os.PathLike[str], output: str | os.PathLike[str], to: str, keep: str | None = None
) -> dict[str, Any]:
    """Spell a pattern of a file that the search wrote as another engine's config fields, without any weights.

    Args:
        path: JSON, as `pattern_file.read_pattern_file` takes.
        output: the JSON file to write; what it holds goes into the engine's config.json, or is given to it as
            overrides (`--hf-overrides`); vLLM on CUDA loads no checkpoint that still has indexers in shared layers.
        to: the engine, as for `export`.
        keep: which of several patterns: a count or a share of full layers.

    Returns:
        The fields.

    Raises:
        ConversionError: unknown engine, no such pattern, one that the engine cannot run, or an output that is taken.
    """
    path, output = Path(path), Path(output)
    engine = engine_named(to)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no readable JSON pattern file: {error}") from error
    content = content if isinstance(content, dict) else {}
    known = content.get("patterns") or {"": content.get("index_share_pattern") or ""}
    spelled = [letters for letters in known.values() if isinstance(letters, str)] if isinstance(known, dict) else []
    if not spelled:
        raise ConversionError(f"{path} holds no pattern of F and S: give what `indexcache search` wrote")
    pattern = read_pattern_file(path, len(spelled[0]), keep)
    source = content.get("source")
    try:
        fields = engine.spell(str(source.get("model_type")) if isinstance(source, dict) else "", pattern)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None
    if not fields:
        raise ConversionError(f"{path} does not say which family it is for: convert the checkpoint and export that")
    if output.exists():
        raise ConversionError(f"the output {output} exists: give another file")
    write_json(output, fields)
    return fields


def _native_fields(fields: dict[str, Any], location: str) -> dict[str, Any]:
    """The config as the source family spells it, without the pattern."""
    if fields.get("model_type") != INDEXCACHE:
        raise ConversionError(
            f"{location}: model_type {fields.get('model_type')!r} is no IndexCache checkpoint: convert it first"
        )
    family = family_of(fields, location)
    check_router(fields, location)
    config = load_config(fields, location)
    defaults = {entry.name: entry.default for entry in dataclasses.fields(IndexCacheConfig)}
    built_in = {name: defaults[name] for name in _BUILT_IN} | family.switches
    built_in["indexer_rope_interleave"] = family.indexer_rope_interleave
    for name, value in built_in.items():
        if getattr(config, name) != value:
            raise ConversionError(
                f"{location}: {name}={getattr(config, name)!r} cannot be exported: {family.model_type} has {value!r} "
                "built in, in every engine"
            )
    native = {name: value for name, value in fields.items() if name not in _OURS}
    # A config that transformers saved leaves out IndexCacheConfig's defaults; the family and the engines have others.
    # What every model has (labels of classes, ...) is nobody's default to spell.
    everyones = {entry.name for entry in dataclasses.fields(PreTrainedConfig)}
    known = {entry.name for entry in dataclasses.fields(CONFIG_MAPPING[family.model_type])} & set(defaults) - everyones
    native |= {name: getattr(config, name) for name in sorted(known - native.keys() - _OURS)}
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]
    return {
        "model_type": family.model_type,
        "architectures": [architecture],
        # vLLM and others route by softmax unless told otherwise.
        **ROUTER,
        **{name: value for name, value in native.items() if name not in ROUTER or value is not None},
        # vLLM and others take half-split RoPE in the indexer unless told otherwise.
        "indexer_rope_interleave": family.indexer_rope_interleave,
    }
