"""Convert a DSA checkpoint into an IndexCache checkpoint: plan on headers, write shards, index and config last.

The source is never written to, and no more than a few MB of it are in memory at once. Killed anywhere, a run with
`resume` finishes what was begun, with the same bytes; until the end the output does not load as a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...configuration.share_pattern import SharePattern
from ..io.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, read_checkpoint
from ..io.hub_source import HubSource
from ..io.shard_writer import (
    OutputShard,
    WrittenFile,
    encode_header,
    hash_files,
    hash_workers,
    mode_of,
    pass_whole,
    path_inside,
    sync_folder,
    write_json,
    write_shard,
)
from ..io.sources import ConversionError, FolderSource, Source
from ..io.strict_json import parse_json
from ..io.tensor_stream import OpenShards
from ..publish.bundle import write_bundle
from ..publish.card import write_card
from .companion_files import CARD_FILE, copy_companions
from .installed_versions import installed_versions
from .journal import (
    DOWNLOAD_FOLDER,
    RECIPE_FILE,
    Journal,
    check_apart,
    output_state,
    remove_leftovers,
    sole_writer,
    take_output,
)
from .plan import Plan, build_plan

# Of a recipe: what it was made with, which does not tell one conversion from another.
_VERSIONS = "versions"
# Shards that are written at a time.
_WRITERS = 4


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    Args:
        pattern: the pattern to write; the source's own when `None`.
        dtype: `auto` leaves every byte as it is; `bfloat16`, `float16`, `float32` cast and dequantise.
        max_shard_size: bytes of tensors a file may hold; the source's sharding when `None`.
        keep_shared_indexers: keep the indexer weights of shared layers.
        copy: copy whole shards, never link them to the source's files.
        resume: finish an interrupted conversion.
        overwrite: replace what an earlier conversion wrote.
        repo_id: the Hub id that the model card names in its loading example.
    """

    pattern: SharePattern | None = None
    dtype: str = "auto"
    max_shard_size: int | None = None
    keep_shared_indexers: bool = False
    copy: bool = False
    resume: bool = False
    overwrite: bool = False
    repo_id: str | None = None


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: its plan, and how each shard came about (`kept` from an earlier run, `linked`, ...)."""

    plan: Plan
    output: Path
    how: dict[str, str]
    warnings: tuple[str, ...]


def plan_conversion(source: Source | Checkpoint, options: ConvertOptions) -> Plan:
    """Read the source's headers, unless they were read already, and plan; writes nothing. Raises ConversionError."""
    return build_plan(
        source if isinstance(source, Checkpoint) else read_checkpoint(source),
        options.pattern,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        keep_shared_indexers=options.keep_shared_indexers,
    )


def convert(
    source: Source,
    output: Path,
    options: ConvertOptions,
    *,
    plan: Plan | None = None,
    on_shard: Callable[[OutputShard, str], None] | None = None,
) -> Conversion:
    """Convert `source` into the folder `output`.

    Args:
        source: where the checkpoint is read from (`open_source`).
        output: the folder to write; absent or empty unless `options` say otherwise.
        options: how.
        plan: what `plan_conversion` made of the same source and options, to save reading the headers twice.
        on_shard: called with each finished shard and how it came about, from any thread.

    Returns:
        The finished conversion.

    Raises:
        ConversionError: the source is damaged or unfit, the output is taken, or the disk is full.
    """
    if isinstance(source, FolderSource):
        check_apart(source.folder, output)
    output_state(output)
    plan = plan or plan_conversion(source, options)
    with sole_writer(output):
        return _convert(plan, output, options, on_shard or (lambda shard, how: None))


def _convert(
    plan: Plan, output: Path, options: ConvertOptions, on_shard: Callable[[OutputShard, str], None]
) -> Conversion:
    state, source, recipe = output_state(output), plan.checkpoint.source, _recipe(plan, options)
    journal = Journal(output, _identity(plan, options, recipe))
    for name in (*_planned_files(plan), f"{DOWNLOAD_FOLDER}/any"):
        path_inside(output, name)
    if state == "finished" and options.resume and not options.overwrite:
        _check_finished(plan, output, options, recipe)
        return Conversion(plan, output, {shard.file: "kept" for shard in plan.shards}, plan.warnings)
    take_output(output, journal, _planned_files(plan), resume=options.resume, overwrite=options.overwrite)
    if isinstance(source, HubSource):
        source.download_folder = output / DOWNLOAD_FOLDER
    _check_disk_space(plan, output, options, journal.finished)
    journal.write()
    how = _write_shards(plan, output, options, journal, on_shard)
    notes = _write_the_rest(plan, output, options, recipe, journal.finished)
    journal.remove()
    sync_folder(output)
    return Conversion(plan, output, how, (*plan.warnings, *notes))


# ---- shards -------------------------------------------------------------------------------------------------------


def _write_shards(
    plan: Plan,
    output: Path,
    options: ConvertOptions,
    journal: Journal,
    on_shard: Callable[[OutputShard, str], None],
) -> dict[str, str]:
    how = dict.fromkeys(journal.finished, "kept")
    for shard in plan.shards:
        if shard.file in how:
            on_shard(shard, "kept")
    pending = [shard for shard in plan.shards if shard.file not in how]
    # Whole shards are hashed, which a core bounds; others are written, which the disk does. A Hub source has one shard
    # at a time on disk; a folder's shards are independent of each other.
    if isinstance(plan.checkpoint.source, HubSource):
        lanes = [pending]
    else:
        hashed = [shard for shard in pending if shard.is_whole and not options.copy]
        written = [shard for shard in pending if not shard.is_whole or options.copy]
        writers = min(_WRITERS, os.cpu_count() or 1, len(written))
        lanes = [hashed] * min(hash_workers(), len(hashed)) + [written] * writers

    def work(lane: list[OutputShard]) -> None:
        held = OpenShards(plan.checkpoint.source)
        try:
            while not failed:
                try:
                    shard = lane.pop(0)
                except IndexError:
                    break
                written = _bring(shard, plan, output, options, held)
                journal.record(shard.file, written)
                how[shard.file] = written.how
                on_shard(shard, written.how)
            held.hold([])
        except BaseException as error:
            failed.append(error)
            held.abandon()
            raise

    failed: list[BaseException] = []
    with ThreadPoolExecutor(max(1, len(lanes))) as pool:
        futures = [pool.submit(work, lane) for lane in lanes]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException as error:  # Ctrl-C: let no worker begin another shard
            failed.append(error)
            raise
    for future in futures:
        future.result()
    return {shard.file: how[shard.file] for shard in plan.shards}


def _bring(shard: OutputShard, plan: Plan, output: Path, options: ConvertOptions, held: OpenShards) -> WrittenFile:
    target = output / shard.file
    if not shard.is_whole:
        return write_shard(shard, target, held)
    source = plan.checkpoint.source
    held.hold([])
    with source.local(shard.file) as path:
        if isinstance(source, HubSource):
            return pass_whole(path, target, move=True, sha256=source.entry(shard.file).sha256)
        return pass_whole(path, target, copy=options.copy)


def _check_disk_space(plan: Plan, output: Path, options: ConvertOptions, finished: Iterable[str]) -> None:
    """Refuse before writing what cannot fit; whole shards that can be linked need no space."""
    source = plan.checkpoint.source
    same_disk = isinstance(source, FolderSource) and all(
        source.path(file).stat().st_dev == output.stat().st_dev for file in plan.checkpoint.shards
    )
    needed = _bytes_to_write(plan, same_disk and not options.copy, finished)
    free = shutil.disk_usage(output).free
    if needed > free:
        ways = "".join(f", or {way}" for way in _ways_to_need_less(plan, options, same_disk, needed, finished))
        raise ConversionError(
            f"the disk of {output} has {free:,} bytes free and the conversion needs {needed:,}: make room{ways}"
        )


def _bytes_to_write(plan: Plan, can_link: bool, finished: Iterable[str]) -> int:
    done = set(finished)
    pending = [shard for shard in plan.shards if shard.file not in done]
    needed = sum(len(encode_header(shard)) + shard.nbytes for shard in pending if not (shard.is_whole and can_link))
    if isinstance(plan.checkpoint.source, HubSource):
        needed += max((header.size for header in plan.checkpoint.shards.values()), default=0)
    return needed


def _ways_to_need_less(
    plan: Plan, options: ConvertOptions, same_disk: bool, needed: int, finished: Iterable[str]
) -> Iterator[str]:
    """The remedies that would indeed help, with what would then be needed."""
    if isinstance(plan.checkpoint.source, HubSource):
        return
    linked = _bytes_to_write(plan, True, finished)
    if same_disk and options.copy and linked < needed:
        yield f"drop --copy (unchanged shards are then linked: {linked:,} bytes are needed)"
    elif not same_disk and linked < needed:
        yield (
            "give an output on the source's own disk, where unchanged shards are linked "
            f"({linked:,} bytes are needed there)"
        )
    if options.keep_shared_indexers or not plan.dropped or (same_disk and options.copy):
        return
    whole = build_plan(
        plan.checkpoint,
        plan.pattern,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        keep_shared_indexers=True,
    )
    kept = _bytes_to_write(whole, True, ())
    if kept < linked:
        where = "" if same_disk else " there"
        yield (
            f"add --keep-shared-indexers: the shards stay as they are and are linked{where} ({kept:,} bytes are "
            "needed); the pattern is the same, and shared indexers lie unused"
        )


# ---- everything else ----------------------------------------------------------------------------------------------


def _write_the_rest(
    plan: Plan, output: Path, options: ConvertOptions, recipe: dict[str, Any], finished: dict[str, dict[str, Any]]
) -> list[str]:
    """Companion files, code, card and recipe; then the index and, as the very last, the config."""
    source = plan.checkpoint.source
    mode = mode_of(source, CONFIG_FILE)
    names = copy_companions(source, output, list(plan.companions))
    names += [path.name for path in write_bundle(output)]
    card = None
    if CARD_FILE in plan.checkpoint.files:
        card = source.read_range(CARD_FILE, 0, source.size(CARD_FILE)).decode("utf-8", errors="replace")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_card(
            output,
            source_card=card,
            source_id=source.id if "/" in source.id else None,
            pattern=plan.pattern,
            recipe=recipe,
            repo_id=options.repo_id,
            topk=plan.config.get("index_topk"),
            bytes_saved=sum(info.nbytes for info in plan.dropped),
        )
    if card is not None and (card_mode := mode_of(source, CARD_FILE)) is not None:
        (output / CARD_FILE).chmod((output / CARD_FILE).stat().st_mode & card_mode)
    shards = {shard.file: finished[shard.file] for shard in plan.shards}
    files = sorted({*names, *shards, CARD_FILE, RECIPE_FILE, CONFIG_FILE, *([INDEX_FILE] if plan.has_index else [])})
    write_json(output / RECIPE_FILE, {**recipe, "shards": shards, "files": files}, mode=mode)
    remove_leftovers(output)
    sync_folder(output)
    if plan.has_index:
        weight_map = dict(sorted(plan.weight_map.items()))
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(output / INDEX_FILE, index, mode=mode)
    write_json(output / CONFIG_FILE, plan.config, mode=mode)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def _planned_files(plan: Plan) -> list[str]:
    return [
        *(shard.file for shard in plan.shards),
        *(companion.name for companion in plan.companions),
        CARD_FILE,
        RECIPE_FILE,
    ]


def _recipe(plan: Plan, options: ConvertOptions) -> dict[str, Any]:
    """What made the output, in words that are the same on every machine."""
    source = plan.checkpoint.source
    command = f"indexcache convert {source.id} OUTPUT --pattern {plan.pattern}"
    if source.revision:
        command += f" --revision {source.revision}"
    if options.dtype != "auto":
        command += f" --dtype {options.dtype}"
    if options.max_shard_size is not None:
        command += f" --max-shard-size {options.max_shard_size}"
    if options.keep_shared_indexers:
        command += " --keep-shared-indexers"
    return {
        "command": command,
        "index_share_pattern": plan.pattern.letters,
        "dtype": options.dtype,
        "max_shard_size": options.max_shard_size,
        "keep_shared_indexers": options.keep_shared_indexers,
        "source": {
            "id": source.id,
            "revision": source.revision,
            "model_type": plan.checkpoint.config.get("model_type"),
            "config_sha256": _sha256_of(source, CONFIG_FILE),
            "index_sha256": _sha256_of(source, INDEX_FILE) if plan.checkpoint.is_sharded else None,
            "headers_sha256": _headers_sha256(plan),
        },
        _VERSIONS: installed_versions("indexcache", "torch", "transformers"),
    }


def _sha256_of(source: Source, file: str) -> str:
    return hashlib.sha256(source.read_range(file, 0, source.size(file))).hexdigest()


def _headers_sha256(plan: Plan) -> str:
    """One digest of every tensor's name, place, dtype and shape in the source."""
    digest = hashlib.sha256()
    for info in plan.checkpoint.tensors.values():
        digest.update(json.dumps([info.file, info.name, info.dtype, info.shape, info.begin, info.end]).encode())
    return digest.hexdigest()


def _identity(plan: Plan, options: ConvertOptions, recipe: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be resumed: the recipe, and the very files of the source."""
    files = [CONFIG_FILE, *([INDEX_FILE] if plan.checkpoint.is_sharded else []), *plan.checkpoint.shards]
    source = plan.checkpoint.source
    return {**recipe, "repo_id": options.repo_id, "source files": [source.fingerprint(file) for file in files]}


def _check_finished(plan: Plan, output: Path, options: ConvertOptions, recipe: dict[str, Any]) -> None:
    """A finished output may be "resumed" when every file is what this run would write, but for the recipe's versions.

    Shards are compared with the sha256s of their recipe; all else is written once more, elsewhere, and compared. So
    what an older release wrote is finished once `indexcache refresh` has put this release's code into it.
    """
    try:
        found = parse_json((output / RECIPE_FILE).read_bytes())
        shards = {shard.file: dict(found["shards"][shard.file]) for shard in plan.shards}
        differs = any(found[key] != value for key, value in recipe.items() if key != _VERSIONS)
        recipe = {**recipe, _VERSIONS: dict(found[_VERSIONS])}
        is_older = recipe[_VERSIONS].get("indexcache") != installed_versions("indexcache")["indexcache"]
    except (OSError, ValueError, KeyError, TypeError):
        shards, differs, is_older, found = {}, True, False, {}
    if differs:
        raise ConversionError(f"{output} holds another finished conversion: give another output, or use --overwrite")
    hashes = hash_files(output / file for file in shards)
    damaged = [
        file
        for file, entry in shards.items()
        if (written := hashes.get(output / file)) is None or written.sha256 != entry.get("sha256")
    ]
    with TemporaryDirectory() as folder:
        again = Path(folder)
        _write_the_rest(plan, again, options, recipe, shards)
        for path in sorted(path for path in again.rglob("*") if path.is_file()):
            name = path.relative_to(again).as_posix()
            there = output / name
            if there.is_file() and there.read_bytes() == path.read_bytes():
                continue
            as_due = name == RECIPE_FILE and is_older and _without_code(parse_json(path.read_bytes()))
            if not as_due or as_due != _without_code(found):
                damaged.append(name)
    if damaged:
        instead = ""
        if is_older and all(name == CONFIG_FILE or _is_code(name) for name in damaged):
            writer = recipe[_VERSIONS].get("indexcache")
            instead = f", or run `indexcache refresh {output}`: IndexCache {writer} wrote it"
        raise ConversionError.collect(
            f"{output} is finished, and {len(damaged)} of its files are not what the conversion wrote: convert again "
            f"with --overwrite{instead}",
            damaged,
        )


def _is_code(name: str) -> bool:
    return name.endswith(".py") and "/" not in name


def _without_code(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the names of the release's code files, which a refresh may add and remove."""
    return {**recipe, "files": [name for name in recipe.get("files", ()) if not _is_code(str(name))]}
