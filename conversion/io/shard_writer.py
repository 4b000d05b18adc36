"""Write files so that a crash leaves either the old state or the new: temporary name, sync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .sources import ConversionError, FolderSource, Source, check_file_name
from .tensor_stream import BLOCK_BYTES, OpenShards, PlannedTensor, tensor_blocks

try:
    import fcntl
except ImportError:  # Windows has no reflinks
    fcntl = None  # type: ignore[assignment]

PARTIAL_SUFFIX = ".partial"
# linux/fs.h; shares a file's blocks with another file that stays independent of it.
_FICLONE = 0x40049409
_NO_LINK_POSSIBLE = (
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
)


class DiskFullError(ConversionError):
    """There is no room for a file; what was written of it is gone."""


@dataclass(frozen=True)
class WrittenFile:
    """What was written, and how: `written`, `cloned`, `linked`, `copied` or `moved`."""

    size: int
    sha256: str
    how: str


@dataclass(frozen=True)
class OutputShard:
    """A file of the output; `is_whole` when a source shard becomes it byte for byte."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    metadata: dict[str, str] | None
    is_whole: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def source_files(self) -> list[str]:
        """The source shards that it reads, in order of first use."""
        return list(dict.fromkeys(tensor.source.file for tensor in self.tensors))


def encode_header(shard: OutputShard) -> bytes:
    """The length and JSON header of a safetensors file, padded to a multiple of 8 bytes."""
    header: dict[str, object] = {} if shard.metadata is None else {"__metadata__": shard.metadata}
    begin = 0
    for tensor in shard.tensors:
        end = begin + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.source.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def path_inside(output: Path, name: str) -> Path:
    """Where a file of the output lies; ConversionError when a folder on the way is a link, which may lead outside."""
    path = output / check_file_name(name, str(output))
    for folder in path.parents:
        if folder == output:
            break
        if folder.is_symlink():
            raise ConversionError(f"{folder} is a link, so {name} would be written elsewhere: remove the link")
    return path


def mode_of(source: Source, *files: str) -> int | None:
    """The permissions that what is made of these files gets: those that all of them give; `None` for the system's."""
    if not files or not isinstance(source, FolderSource):
        return None
    mode = 0o777
    for file in files:
        mode &= source.path(file).stat().st_mode
    return mode


def write_shard(shard: OutputShard, target: Path, shards: OpenShards) -> WrittenFile:
    """Write a shard's header and tensors, block by block, with the permissions of the shards that it comes from.

    Raises:
        ConversionError: the source ends early, a value does not fit its dtype, or the disk is full.
    """
    shards.hold(shard.source_files)

    def content() -> Iterable[bytes | memoryview]:
        yield encode_header(shard)
        for tensor in shard.tensors:
            yield from tensor_blocks(tensor, shards)

    return write_blocks(target, content(), mode=mode_of(shards.source, *shard.source_files))


def write_blocks(
    target: Path, blocks: Iterable[bytes | memoryview], *, durable: bool = True, mode: int | None = None
) -> WrittenFile:
    """Write blocks under a temporary name, sync unless told not to, and rename; an error leaves nothing behind.

    Args:
        target: the file.
        blocks: its bytes, in order.
        durable: wait until they are on disk.
        mode: permissions from the first byte on, less what the umask takes; the system's when `None`.
    """
    digest, size = hashlib.sha256(), 0

    def fill(partial: Path) -> None:
        nonlocal size
        with open(partial, "xb", buffering=0, opener=_opener(mode)) as stream:
            for block in blocks:
                write_all(stream.fileno(), block)
                digest.update(block)
                size += len(block)
            if durable:
                os.fsync(stream.fileno())

    _publish(target, fill)
    return WrittenFile(size, digest.hexdigest(), "written")


def _opener(mode: int | None) -> Callable[[str, int], int]:
    return lambda path, flags: os.open(path, flags, 0o666 if mode is None else mode)


def write_all(descriptor: int, block: bytes | memoryview) -> None:
    """Write all of a block."""
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]


def write_text(target: Path, text: str, *, durable: bool = True, mode: int | None = None) -> None:
    """Write a small text file."""
    write_blocks(target, [text.encode()], durable=durable, mode=mode)


def write_json(target: Path, value: object, *, durable: bool = True, mode: int | None = None) -> None:
    """Write a value as JSON, keys in the order given."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n", durable=durable, mode=mode)


def pass_whole(
    source: Path, target: Path, *, copy: bool = False, move: bool = False, sha256: str | None = None
) -> WrittenFile:
    """Bring a source file to the output byte for byte.

    Tries a reflink, then a hard link, then a copy: the first two cost neither time nor space. A hard link is the
    source's own file under a second name, which is why no output file is ever opened for writing in place.

    Args:
        source: the file; never written to.
        target: its place in the output.
        copy: make an independent copy at once.
        move: the file is a download of ours: take it away.
        sha256: of the file, where it has just been checked; saves reading it again.
    """
    if copy:
        return _copied(source, target)
    for how, bring in (("moved", _move),) if move else (("cloned", _clone), ("linked", _link)):
        try:
            _publish(target, lambda partial, bring=bring: bring(source, partial))  # type: ignore[misc]
        except OSError as error:
            if error.errno not in (*_NO_LINK_POSSIBLE, errno.EINVAL, errno.ENOTTY):
                raise
        else:
            return hash_file(target, how) if sha256 is None else WrittenFile(target.stat().st_size, sha256, how)
    return _copied(source, target)


def _copied(source: Path, target: Path) -> WrittenFile:
    with open(source, "rb", buffering=0) as stream:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        blocks = (buffer[:count] for count in iter(lambda: stream.readinto(buffer), 0))
        written = write_blocks(target, blocks, mode=source.stat().st_mode & 0o777)
    return WrittenFile(written.size, written.sha256, "copied")


def _clone(source: Path, partial: Path) -> None:
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "no reflinks here")
    with open(source, "rb") as original, open(partial, "xb", opener=_opener(source.stat().st_mode & 0o777)) as twin:
        fcntl.ioctl(twin.fileno(), _FICLONE, original.fileno())
        os.fsync(twin.fileno())


def _link(source: Path, partial: Path) -> None:
    os.link(source, partial)


def _move(source: Path, partial: Path) -> None:
    os.replace(source, partial)
    with open(partial, "rb") as stream:
        os.fsync(stream.fileno())


def _publish(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` make the file under a temporary name, then give it its own name, on disk for good."""
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    partial.unlink(missing_ok=True)
    try:
        fill(partial)
        os.replace(partial, target)
        # Renaming one hard link over another to the same file does nothing.
        _remove(partial)
    except OSError as error:
        _remove(partial)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free
            raise DiskFullError(
                f"the disk is full: {target} could not be written ({free:,} bytes are free): make room and run the "
                "same command with --resume"
            ) from error
        raise
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def hash_file(path: Path, how: str = "written") -> WrittenFile:
    """Size and sha256 of a file, read in blocks."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return WrittenFile(size, digest.hexdigest(), how)


def hash_files(paths: Iterable[Path]) -> dict[Path, WrittenFile]:
    """Size and sha256 of each file that is there, several at a time: hashing is bound by a core's speed."""
    present = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor(hash_workers()) as pool:
        return dict(zip(present, pool.map(hash_file, present)))


def hash_workers() -> int:
    """How many files to hash at a time; hashlib lets go of Python's lock."""
    return min(16, os.cpu_count() or 1)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
