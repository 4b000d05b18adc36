"""Where a checkpoint is read from, and the error for what its user can mend."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from .hub_integrity import is_commit_id

_MAX_PROBLEMS_SHOWN = 12


class ConversionError(ValueError):
    """Something that the person who runs the conversion can mend; the message says what, where and how."""

    @classmethod
    def collect(cls, heading: str, problems: Sequence[str]) -> ConversionError:
        """One error for several problems: the first dozen are listed, the others counted."""
        shown = [f"  - {problem}" for problem in problems[:_MAX_PROBLEMS_SHOWN]]
        if len(problems) > len(shown):
            shown.append(f"  - and {len(problems) - len(shown)} more")
        return cls("\n".join([heading, *shown]))


class Source(Protocol):
    """Where a checkpoint is read from: a folder (`FolderSource`) or a Hub repository (`HubSource`)."""

    #: How cards and recipes name it: `org/name`, or the folder's name.
    id: str
    #: The Hub commit, where known.
    revision: str | None
    #: How errors name it.
    location: str

    def list_files(self) -> list[str]:
        """All files, as POSIX paths relative to the checkpoint, sorted."""
        ...

    def size(self, file: str) -> int:
        """Bytes of one file; ConversionError when it is absent or lies outside the checkpoint."""
        ...

    def read_range(self, file: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of one file, fewer at its end."""
        ...

    def local(self, file: str) -> AbstractContextManager[Path]:
        """The file on this machine while the block lasts."""
        ...

    def fingerprint(self, file: str) -> list[Any]:
        """JSON-ready marks that change when the file's content does, found without reading it."""
        ...


class FolderSource:
    """A checkpoint in a folder, a snapshot in the Hub's cache included. It is never written to."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        # An empty name would be the current folder.
        if not os.fspath(folder) or not self.folder.is_dir():
            raise ConversionError(
                f"{str(folder) or repr('')} is no folder: give a checkpoint's folder or a Hub id such as org/name"
            )
        self.location = str(folder)
        if not is_unicode(str(self.folder.resolve())):
            raise ConversionError(f"{str(folder)!r} is no name in UTF-8: rename the folder")
        self.id = self.folder.resolve().name
        self.revision: str | None = None
        self._roots = [self.folder.resolve()]
        # A snapshot in the Hub's cache is made of links into the blobs beside it.
        snapshots = self.folder.absolute().parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            self._roots.append((snapshots.parent / "blobs").resolve())
            self.id = snapshots.parent.name.removeprefix("models--").replace("--", "/", 1)
            if is_commit_id(self.folder.absolute().name):
                self.revision = self.folder.absolute().name

    def path(self, file: str) -> Path:
        """The real path of a file, checked to lie inside the checkpoint."""
        check_file_name(file, self.location)
        path = self.folder / file
        if not path.is_file():
            if os.path.lexists(path):
                raise ConversionError(
                    f"{self.location}: {file} is no regular file (a folder, a pipe, or a link to nothing): "
                    "remove it, or fetch it again"
                )
            raise ConversionError(f"{self.location}: {file} is missing: fetch it again, or fix what names it")
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in self._roots):
            raise ConversionError(
                f"{self.location}: {file} is a link to {real}, outside the checkpoint: put the file itself there"
            )
        return real

    def list_files(self) -> list[str]:
        """All files, as POSIX paths relative to the folder, sorted; hidden folders are left out.

        Raises:
            OSError: a folder that cannot be read.
        """
        found = []

        def unreadable(error: OSError) -> None:
            raise error

        for folder, folders, files in os.walk(self.folder, onerror=unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [(Path(folder) / name).relative_to(self.folder).as_posix() for name in files]
        return sorted(found)

    def size(self, file: str) -> int:
        """Bytes of one file."""
        return self.path(file).stat().st_size

    def read_range(self, file: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of one file."""
        with open(self.path(file), "rb") as stream:
            stream.seek(begin)
            return stream.read(end - begin)

    @contextmanager
    def local(self, file: str) -> Iterator[Path]:
        """The file's real path."""
        yield self.path(file)

    def fingerprint(self, file: str) -> list[Any]:
        """Path, size and time of last change."""
        path = self.path(file)
        status = path.stat()
        return [str(path), status.st_size, status.st_mtime_ns]


def check_file_name(file: object, location: str) -> str:
    """`file` itself when it is a plain relative path that stays inside the checkpoint."""
    if not isinstance(file, str) or not file or "\\" in file or "\0" in file or not is_unicode(file):
        raise ConversionError(f"{location}: {file!r} is no file name")
    if any(unicodedata.category(character) == "Cc" for character in file):
        raise ConversionError(f"{location}: {file!r} holds control characters: rename the file")
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise ConversionError(f"{location}: {file!r} points outside the checkpoint: name a file inside it")
    return file


def pipes_in(folder: Path, *, below: bool) -> list[str]:
    """Pipes and devices in a folder, behind links too, as sorted POSIX paths: opening one may wait for ever.

    Args:
        folder: an output that is there.
        below: look into its folders, too; links to folders are not followed.

    Raises:
        OSError: a folder that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise error

    found = []
    for at, folders, names in os.walk(folder, onerror=unreadable):
        if not below:
            folders.clear()
        for name in names:
            path = Path(at) / name
            try:
                mode = path.stat().st_mode
            except OSError:  # a link to nothing, or in a circle
                continue
            if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def refuse_pipes(folder: Path) -> None:
    """ConversionError where an output holds pipes or devices, however deep."""
    if pipes := pipes_in(folder, below=True):
        raise ConversionError.collect(
            f"the output {folder} holds pipes or devices where files belong: remove them, or give another folder",
            pipes,
        )


def is_unicode(name: str) -> bool:
    """Whether a name can be written as UTF-8: on disk it may be any bytes, which Python shows as half surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
