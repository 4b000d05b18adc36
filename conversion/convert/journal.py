"""The state of an unfinished conversion, and who may write to its output folder."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..io.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from ..io.shard_writer import PARTIAL_SUFFIX, WrittenFile, hash_files, path_inside, write_json
from ..io.sources import ConversionError, is_unicode, refuse_pipes
from ..io.strict_json import parse_json

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

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
            state = parse_json(self._path.read_bytes())
            identity, shards = dict(state["identity"]), _sizes_and_hashes(state["shards"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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
        paths = {file: path_inside(self._path.parent, file) for file in shards}
        found = hash_files(paths.values())
        for file, path in paths.items():
            if path in found and {"size": found[path].size, "sha256": found[path].sha256} == shards[file]:
                self.finished[file] = shards[file]

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


def _sizes_and_hashes(entries: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {file: {"size": entry["size"], "sha256": entry["sha256"]} for file, entry in entries.items()}


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
    """`empty` (or absent), `interrupted`, `finished` (a converted checkpoint), or `foreign`.

    Raises:
        ConversionError: no folder, a name that is no UTF-8, or pipes or devices in it, which nothing may open.
    """
    if not is_unicode(str(output)):
        raise ConversionError(f"the output {str(output)!r} is no name in UTF-8: give another name")
    if not output.exists():
        return "empty"
    if not output.is_dir():
        raise ConversionError(f"the output {output} is no folder: give another name")
    refuse_pipes(output)
    names = {path.name for path in output.iterdir()} - {JOURNAL_FILE + PARTIAL_SUFFIX}
    if not names:
        return "empty"
    if JOURNAL_FILE in names:
        return "interrupted"
    return "finished" if set(_MARKS) & names and CONFIG_FILE in names else "foreign"


def take_output(
    output: Path,
    journal: Journal,
    planned: Iterable[str],
    *,
    resume: bool,
    overwrite: bool,
    work: str = "conversion",
    folders: Iterable[str] = (),
) -> None:
    """Make an output folder that holds no finished work of this run's ready for it.

    Args:
        output: the folder; made where it is absent.
        journal: of the work; it takes up what an interrupted run left.
        planned: files that will be written, removed when an earlier run's output is replaced.
        resume: go on with an interrupted run.
        overwrite: replace what an earlier run wrote.
        work: what messages call it.
        folders: likewise removed.

    Raises:
        ConversionError: the folder is taken, or holds another run that was interrupted.
    """
    state = output_state(output)
    if overwrite and not (resume and state == "interrupted"):
        if state != "empty":
            clear_output(output, planned)
            for folder in folders:
                shutil.rmtree(output / folder, ignore_errors=True)
    elif state == "interrupted" and resume:
        journal.resume()
        remove_partials(output)
    elif state == "interrupted":
        raise ConversionError(f"{output} holds an interrupted {work}: finish it with --resume, or use --overwrite")
    elif state != "empty":
        what = "nothing to resume" if resume else "an earlier conversion" if state == "finished" else "files"
        raise ConversionError(f"the output {output} is not empty (it holds {what}): give another, or use --overwrite")
    output.mkdir(parents=True, exist_ok=True)


def clear_output(output: Path, planned: Iterable[str]) -> None:
    """Remove what a former conversion wrote to `output`, and what the next one will write; nothing else.

    The config goes first, so that what remains after a crash does not load as a model.
    """
    names = [CONFIG_FILE, INDEX_FILE, SINGLE_FILE, *planned]
    for mark, field in ((RECIPE_FILE, "files"), (JOURNAL_FILE, "shards")):
        try:
            named = parse_json((output / mark).read_bytes())[field]
            names += [name for name in named if isinstance(name, str)]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for name in [*dict.fromkeys(names), *_MARKS]:
        try:
            path = path_inside(output, name)
            if path.is_file() or path.is_symlink():
                path.unlink()
        except (ConversionError, NotADirectoryError):
            continue
    remove_leftovers(output)


def remove_partials(output: Path) -> None:
    """Remove the temporary files of a run that was cut off; its downloads stay, to go on from."""
    for path in output.glob(f"*{PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


def remove_leftovers(output: Path) -> None:
    """Remove temporary files and downloads."""
    remove_partials(output)
    shutil.rmtree(output / DOWNLOAD_FOLDER, ignore_errors=True)


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Make the folder and keep every other conversion out of it until the block ends.

    The lock is the kernel's, on the folder itself: a killed process leaves nothing behind. File systems that have no
    locks go without.

    Raises:
        ConversionError: another process converts into it.
    """
    output.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConversionError(
                f"another conversion is writing to {output}: wait for it, or give another output"
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
