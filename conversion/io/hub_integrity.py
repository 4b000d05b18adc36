"""What a Hub's commit says of each file, and the comparison of what arrives with it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 4 << 20


def is_commit_id(value: object) -> bool:
    """Whether this is a commit's full id, 40 hexadecimal digits: no branch, no tag, no `None`."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40}", value) is not None


def git_blob_id(content: bytes) -> str:
    """The id under which git, and so the Hub's tree, knows a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit: its bytes, its git blob id (that of the pointer, for LFS) and, for LFS, its sha256."""

    size: int
    blob_id: str
    sha256: str | None

    @classmethod
    def from_tree(cls, entry: Any) -> HubFile:
        """One entry of `HfApi.list_repo_tree`; ValueError when it cannot be checked against."""
        size = entry.lfs.size if entry.lfs else entry.size
        sha256 = entry.lfs.sha256 if entry.lfs else None
        if type(size) is not int or size < 0:
            raise ValueError(f"{entry.path} has the size {size!r}")
        if not is_commit_id(entry.blob_id) or (entry.lfs and not re.fullmatch(r"[0-9a-f]{64}", str(sha256))):
            raise ValueError(f"{entry.path} has the blob id {entry.blob_id!r} and the sha256 {sha256!r}")
        return cls(size, entry.blob_id, sha256)


class RunningCheck:
    """Hashes a file's bytes as they come, in order, and compares them with the commit's at the end.

    Args:
        expected: the file as its commit has it.
    """

    def __init__(self, expected: HubFile) -> None:
        self._expected = expected
        self._digest = (
            hashlib.sha256() if expected.sha256 else hashlib.sha1(b"blob %d\0" % expected.size, usedforsecurity=False)
        )
        #: Bytes taken so far.
        self.position = 0

    def take(self, block: bytes | memoryview) -> None:
        """The next bytes."""
        self._digest.update(block)
        self.position += len(block)

    @property
    def is_complete(self) -> bool:
        """Whether as many bytes came as the file has."""
        return self.position >= self._expected.size

    def fault(self) -> str | None:
        """What is wrong with all that came; `None` when it is the commit's file."""
        if self.position != self._expected.size:
            return f"it has {self.position} bytes where {self._expected.size} were due"
        due, found = self._expected.sha256 or self._expected.blob_id, self._digest.hexdigest()
        kind = "sha256" if self._expected.sha256 else "git blob id"
        return None if found == due else f"its {kind} is {found} where {due} was due"


@dataclass(frozen=True, slots=True)
class SeenRange:
    """A part of a file that was used before the whole could be checked."""

    begin: int
    end: int
    sha256: bytes

    @classmethod
    def of(cls, begin: int, content: bytes) -> SeenRange:
        """The part that begins at `begin`."""
        return cls(begin, begin + len(content), hashlib.sha256(content).digest())


def file_fault(path: Path, expected: HubFile, seen: Iterable[SeenRange] = ()) -> str | None:
    """What is wrong with a file on this machine, or with the parts of it that were seen before; `None` if nothing."""
    check = RunningCheck(expected)
    with open(path, "rb", buffering=0) as stream:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while count := stream.readinto(buffer):
            check.take(buffer[:count])
        if (fault := check.fault()) is not None:
            return fault
        for part in seen:
            stream.seek(part.begin)
            if hashlib.sha256(stream.read(part.end - part.begin)).digest() != part.sha256:
                return f"its bytes {part.begin}-{part.end - 1}, read ahead, came otherwise than in the whole file"
    return None
