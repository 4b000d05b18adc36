"""The state of an unfinished conversion, and who may write to its output folder."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, ConversionError, check_file_name
from .shard_writer import PARTIAL_SUFFIX, WrittenFile, hash_file, write_json

JOURNAL_FILE = ".indexcache_convert.json"
RECIPE_FILE = "indexcache_recipe.json"
DOWNLOAD_FOLDER = ".indexcache_download"
# A folder with one of these is ours: a conversion was begun or finished in it.
_MARKS = (JOURNAL_FILE, RECIPE_FILE)


class Journal:
    """The finished shards of a conversion with their sizes and sha256s, kept in the output until it is complete.

    Args:
        output: the output folder.
        identity: what is converted, and how, as JSON values; a run with another identity is not resumed.
    """

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        self._path = output / JOURNAL_FILE
        self._identity = identity
        self._lock = threading.Lock()
        self.finished: dict[str, dict[str, Any]] = {}

    def resume(self) -> None:
        """Take up the finished shards that an interrupted run left, each checked against its sha256.

        Raises:
            ConversionError: it was another conversion, or the journal is damaged.
        """
        try:
            state = json.loads(self._path.read_text(encoding="utf-8"))
            identity, shards = state["identity"], dict(state["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{self._path} is damaged ({error}): start again with --overwrite") from error
        differing = [key for key in self._identity if identity.get(key) != self._identity[key]]
        if differing:
            changes = [
                f"{key}: begun with {_short(identity.get(key))}, now {_short(self._identity[key])}"
                for key in differing
            ]
            raise ConversionError.collect(
                f"{self._path.parent} holds another conversion that was interrupted: repeat its command with "
                "--resume, or start again with --overwrite",
                changes,
            )
        for file, entry in shards.items():
            path = self._path.parent / check_file_name(file, str(self._path))
            if path.is_file() and path.stat().st_size == entry["size"] and hash_file(path).sha256 == entry["sha256"]:
                self.finished[file] = entry

    def record(self, file: str, written: WrittenFile) -> None:
        """Note that a shard is finished. Safe to call from several threads."""
        with self._lock:
            self.finished[file] = {"size": written.size, "sha256": written.sha256}
            self.write()

    def write(self) -> None:
        """Put the journal on disk."""
        # Not synced: what it says is checked by sha256 when it is read again.
        write_json(self._path, {"identity": self._identity, "shards": self.finished}, durable=False)

    def remove(self) -> None:
        """The conversion is complete."""
        self._path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_apart(source: Path, output: Path) -> None:
    """The output may neither be the source, nor lie in it, nor hold it; ConversionError otherwise."""
    source, output = source.resolve(), output.resolve()
    if source == output:
        raise ConversionError(f"the output {output} is the source itself: give another folder")
    if output.is_relative_to(source):
        raise ConversionError(f"the output {output} lies inside the source {source}: give a folder outside it")
    if source.is_relative_to(output):
        raise ConversionError(f"the source {source} lies inside the output {output}: give another folder")


def output_state(output: Path) -> str:
    """`empty` (or absent), `interrupted`, `finished` (a converted checkpoint), or `foreign`."""
    if not output.exists():
        return "empty"
    if not output.is_dir():
        raise ConversionError(f"the output {output} is no folder: give another name")
    names = {path.name for path in output.iterdir()} - {JOURNAL_FILE + PARTIAL_SUFFIX}
    if not names:
        return "empty"
    if JOURNAL_FILE in names:
        return "interrupted"
    return "finished" if set(_MARKS) & names and CONFIG_FILE in names else "foreign"


def clear_output(output: Path, planned: Iterable[str]) -> None:
    """Remove what a former conversion wrote to `output`, and what the next one will write; nothing else.

    The config goes first, so that what remains after a crash does not load as a model.
    """
    names = [CONFIG_FILE, INDEX_FILE, SINGLE_FILE, *planned]
    for mark, field in ((RECIPE_FILE, "files"), (JOURNAL_FILE, "shards")):
        try:
            names += list(json.loads((output / mark).read_text(encoding="utf-8"))[field])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for name in [*dict.fromkeys(names), *_MARKS]:
        try:
            path = output / check_file_name(name, str(output))
        except ConversionError:
            continue
        if path.is_file() or path.is_symlink():
            path.unlink()
    remove_leftovers(output)


def remove_partials(output: Path) -> None:
    """Remove the temporary files of a run that was cut off; its downloads stay, to go on from."""
    for path in output.glob(f"*{PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


def remove_leftovers(output: Path) -> None:
    """Remove temporary files and downloads."""
    remove_partials(output)
    shutil.rmtree(output / DOWNLOAD_FOLDER, ignore_errors=True)
