"""Put the installed release's code into a checkpoint that an older one wrote; weights, card and settings stay.

A checkpoint carries the code of the release that wrote it, and with it that release's faults. A refresh replaces that
code and the version in config.json, where every other byte stays; what the old release shipped and the new one does
not is removed. Files that are not the package's are never touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from packaging.version import InvalidVersion, Version

from ...configuration.hub_code import AUTO_MAP, code_version, version_in_header
from ..convert.families import INDEXCACHE
from ..convert.journal import JOURNAL_FILE
from ..io.checkpoint import CONFIG_FILE, read_json
from ..io.hub_integrity import git_blob_id, is_commit_id
from ..io.hub_source import HubSource
from ..io.shard_writer import PARTIAL_SUFFIX, sync_folder
from ..io.sources import ConversionError, FolderSource, Source
from .bundle import checked_hub_code
from .hub import hub_errors, require_token

VERSION_FIELD = "indexcache_version"
# Longer than any header line of a shipped file.
_HEADER_BYTES = 200


@dataclass(frozen=True)
class RefreshPlan:
    """What a refresh does to one checkpoint: code files by what happens to them, and the config if it changes."""

    location: str
    old_version: str | None
    new_version: str
    changed: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    #: New content of all files that are written, config.json last.
    content: dict[str, bytes] = field(repr=False)

    @property
    def is_current(self) -> bool:
        """Whether the checkpoint has this code already."""
        return not (self.content or self.removed)

    def summary(self) -> dict[str, Any]:
        """JSON-ready values for `indexcache refresh --json`."""
        return {
            "location": self.location,
            "from": self.old_version,
            "to": self.new_version,
            "changed": list(self.changed),
            "added": list(self.added),
            "removed": list(self.removed),
            "config": CONFIG_FILE in self.content,
        }


def plan_refresh(source: Source) -> RefreshPlan:
    """Compare a checkpoint's code with the installed release's; writes nothing.

    Args:
        source: an IndexCache checkpoint, folder or Hub repository.

    Raises:
        ConversionError: it is no IndexCache checkpoint, takes its code from elsewhere, was written by a newer release,
            or holds a file of another author under the name of one that ships.
    """
    fields = _checked_fields(source)
    code = {name: text.encode() for name, text in checked_hub_code().items()}
    present = [name for name in source.list_files() if name.endswith(".py") and "/" not in name]
    changed = [name for name in code if name in present and not _holds(source, name, code[name])]
    stale = {name: _release_of(source, name) for name in present if name not in code}
    replaced = {name: _release_of(source, name) for name in changed}
    foreign = sorted(name for name, release in replaced.items() if release is None)
    if foreign:
        raise ConversionError.collect(
            f"{source.location}: these files are not IndexCache's and the release's own have their names: move them "
            "away first",
            foreign,
        )
    old = fields.get(VERSION_FIELD) or next((release for release in replaced.values() if release), None)
    new = str(code_version())
    _refuse_newer(source.location, old, new)
    added = [name for name in code if name not in present]
    content = {name: code[name] for name in (*changed, *added)}
    if fields.get(VERSION_FIELD) != new:
        raw = source.read_range(CONFIG_FILE, 0, source.size(CONFIG_FILE))
        content[CONFIG_FILE] = _with_field(raw, VERSION_FIELD, new, source.location)
    removed = sorted(name for name, release in stale.items() if release is not None)
    return RefreshPlan(source.location, old, new, tuple(changed), tuple(added), tuple(removed), content)


def refresh(source: Source, plan: RefreshPlan, *, revision: str | None = None, token: str | None = None) -> str | None:
    """Carry out a plan: in a folder file by file, config last; on the Hub in one commit on top of the one planned for.

    Args:
        source: the checkpoint that was planned for.
        plan: from `plan_refresh`.
        revision: branch of a Hub repository; `main` when `None`.
        token: Hub token; the saved login when `None`.

    Returns:
        The commit's address for a Hub repository that changed, else `None`.

    Raises:
        ConversionError: no permission, no room, or a commit in between. A folder is then as it was, or the message
            says that the same command finishes it.
    """
    if plan.is_current:
        return None
    if isinstance(source, FolderSource):
        _refresh_folder(source.folder, plan)
        return None
    return _commit(source, plan, revision, token)


def _checked_fields(source: Source) -> dict[str, Any]:
    """The config of a checkpoint that can be refreshed."""
    fields = read_json(source, CONFIG_FILE)
    if fields.get("model_type") != INDEXCACHE:
        raise ConversionError(
            f"{source.location}: model_type {fields.get('model_type')!r} is no IndexCache checkpoint and carries none "
            "of its code: convert it"
        )
    if fields.get("auto_map") != AUTO_MAP:
        raise ConversionError(
            f"{source.location}: its auto_map {json.dumps(fields.get('auto_map'))} does not take the code beside it "
            f"({json.dumps(AUTO_MAP)}): refresh the repository that it names, or convert the checkpoint again"
        )
    if isinstance(source, FolderSource):
        if JOURNAL_FILE in source.list_files():
            raise ConversionError(f"{source.location} is unfinished: finish it first, with --resume")
        if source.folder.absolute().parent.name == "snapshots":
            raise ConversionError(
                f"{source.location} is a snapshot in the Hub's cache, whose files other snapshots share: refresh the "
                "Hub repository, or a copy of the folder"
            )
    return fields


def _holds(source: Source, name: str, content: bytes) -> bool:
    """Whether a file has this content; on the Hub its blob id tells without reading."""
    if source.size(name) != len(content):
        return False
    if isinstance(source, HubSource) and source.entry(name).sha256 is None:
        return source.entry(name).blob_id == git_blob_id(content)
    return source.read_range(name, 0, len(content)) == content


def _release_of(source: Source, name: str) -> str | None:
    """The release whose header a code file has; `None` for a file of others."""
    return version_in_header(source.read_range(name, 0, _HEADER_BYTES).decode("utf-8", errors="replace"))


def _refuse_newer(location: str, old: object, new: str) -> None:
    with suppress(InvalidVersion, TypeError):
        if Version(str(old)) > Version(new):
            raise ConversionError(
                f"{location} has the code of IndexCache {old}, newer than the installed {new}: upgrade the package"
            )


# ---- config.json, byte by byte ------------------------------------------------------------------------------------


def _with_field(raw: bytes, name: str, value: str, location: str) -> bytes:
    """A JSON object's text with one field set; every byte that does not belong to the field stays."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{location}: {CONFIG_FILE} is not UTF-8 ({error}): save it as UTF-8") from error
    end = before = ""
    for key, gap, begin, stop in _members(text):
        if key == name:
            return (text[:begin] + json.dumps(value) + text[stop:]).encode()
        before, end = gap, text[:stop]
    return f"{end},{before}{json.dumps(name)}: {json.dumps(value)}{text[len(end) :]}".encode()


def _members(text: str) -> Iterator[tuple[str, str, int, int]]:
    """The members of a JSON object that is known to be valid: key, white space before it, its value's place."""
    decoder, at = json.JSONDecoder(), text.index("{") + 1
    while True:
        key_at = _skip_space(text, at)
        if text[key_at] == "}":
            return
        key, key_end = decoder.raw_decode(text, key_at)
        begin = _skip_space(text, _skip_space(text, key_end) + 1)
        _, stop = decoder.raw_decode(text, begin)
        yield key, text[at:key_at], begin, stop
        at = _skip_space(text, stop)
        if text[at] == "}":
            return
        at += 1


def _skip_space(text: str, at: int) -> int:
    match = re.compile(r"[ \t\n\r]*").match(text, at)
    return match.end() if match else at


# ---- writing ------------------------------------------------------------------------------------------------------


def _refresh_folder(folder: Path, plan: RefreshPlan) -> None:
    """All new files are on disk under temporary names before the first takes its place; the config's comes last."""
    partials = {name: folder / f"{name}{PARTIAL_SUFFIX}" for name in plan.content}
    try:
        for name, partial in partials.items():
            _write(partial, plan.content[name])
            like = folder / name
            shutil.copymode(like if like.is_file() else folder / CONFIG_FILE, partial)
    except BaseException as error:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConversionError(
                f"{folder} cannot be written to ({error.strerror or error}) and is as it was: make room or get "
                "permission, then refresh again"
            ) from error
        raise
    try:
        for name, partial in partials.items():
            if name != CONFIG_FILE:
                os.replace(partial, folder / name)
        for name in plan.removed:
            (folder / name).unlink(missing_ok=True)
        if CONFIG_FILE in partials:
            os.replace(partials[CONFIG_FILE], folder / CONFIG_FILE)
    except OSError as error:
        raise ConversionError(
            f"{folder} is refreshed in part ({error.filename}: {error.strerror or error}): fix that and run the same "
            "command again to finish"
        ) from error
    sync_folder(folder)


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    with open(path, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _commit(source: Source, plan: RefreshPlan, revision: str | None, token: str | None) -> str:
    if is_commit_id(revision):
        raise ConversionError(f"a commit cannot be changed (revision {revision}): give a branch of {source.id}")
    require_token(source.id, token)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in plan.content.items()
    ]
    operations += [CommitOperationDelete(name) for name in plan.removed]
    with hub_errors(source.id, token):
        commit = HfApi(token=token, library_name="indexcache").create_commit(
            source.id,
            operations,
            commit_message=f"Refresh the code to IndexCache {plan.new_version}",
            revision=revision,
            parent_commit=source.revision,
        )
    return str(commit.commit_url)


__all__ = ["RefreshPlan", "plan_refresh", "refresh"]
