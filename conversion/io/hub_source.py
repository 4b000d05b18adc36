"""A checkpoint on the Hub: headers by HTTP range, then one shard at a time on disk, each checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from .hub_integrity import HubFile, RunningCheck, SeenRange, file_fault, is_commit_id
from .hub_requests import GARBLED_ANSWERS, HUB_FAILURES, UnfitAnswer, patiently, read_bytes, redact
from .sources import ConversionError, check_file_name

# Files that are fetched and compared at a time.
_FETCHERS = 8


class HubSource:
    """A model repository at one commit.

    Sizes, git blob ids and sha256s of all files are known from the commit before the first byte is read. A file that
    is read from begin to end is compared with them as it comes, and a shard when it has been downloaded, before
    anything is made of it. Where parts alone are read (headers, for a plan), their place and length are checked, and
    they are compared with the whole file if that is fetched later.

    Args:
        repo_id: `org/name`.
        revision: branch, tag or commit; resolved once, so that a push in between changes nothing.
        token: Hub token; the saved login when `None`.

    Raises:
        ConversionError: no such repository or revision, no access, no connection, or answers that are no Hub's.
    """

    def __init__(self, repo_id: str, *, revision: str | None = None, token: str | None = None) -> None:
        self.id, self._token = repo_id, token
        self.location = f"Hub repository {repo_id}"
        self._headers = build_hf_headers(token=token)
        #: Where shards are put while they are read; beside the output, so that they can be moved there.
        self.download_folder: Path | None = None
        self.revision: str | None = None
        try:
            self.revision, self._files = self._read_commit(revision)
        except RevisionNotFoundError as error:
            raise ConversionError(
                f"{self.location} has no revision {revision!r}: see its branches and tags"
            ) from error
        except RepositoryNotFoundError as error:
            raise ConversionError(
                f"{repo_id} is neither a folder here nor a repository on the Hub that this login can read: "
                "check the name, or give --token"
            ) from error
        except HUB_FAILURES as error:
            raise ConversionError(f"{self.location} cannot be reached: {self._told(error)}") from error
        except GARBLED_ANSWERS as error:
            raise ConversionError(
                f"{self.location}: {constants.ENDPOINT} answers as no Hub does ({self._told(error)}): is a proxy in "
                "between, or HF_ENDPOINT wrong?"
            ) from error
        self._checks: dict[str, RunningCheck] = {}
        self._seen: dict[str, list[SeenRange]] = {}
        #: Files in the Hub's cache that have been compared with the commit.
        self._fetched: set[str] = set()

    def _read_commit(self, revision: str | None) -> tuple[str, dict[str, HubFile]]:
        """The commit that `revision` is now, and its files."""
        api = HfApi(token=self._token)
        info = patiently(lambda: api.model_info(self.id, revision=revision), also_unreachable=False)
        if not is_commit_id(info.sha):
            raise ValueError(f"it names {info.sha!r} as the commit of {revision or 'the main branch'}")
        commit = str(info.sha)
        tree = patiently(lambda: list(api.list_repo_tree(self.id, recursive=True, revision=commit)))
        files = {entry.path: HubFile.from_tree(entry) for entry in tree if isinstance(entry, RepoFile)}
        if not files:
            raise ValueError(f"commit {commit} has no files")
        return commit, files

    def list_files(self) -> list[str]:
        """All files of the commit, sorted."""
        return sorted(self._files)

    def entry(self, file: str) -> HubFile:
        """What the commit says of one file."""
        check_file_name(file, self.location)
        if file not in self._files:
            raise ConversionError(f"{self.location}: {file} is missing")
        return self._files[file]

    def size(self, file: str) -> int:
        """Bytes of one file."""
        return self.entry(file).size

    def read_range(self, file: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of one file, by an HTTP range request.

        Raises:
            ConversionError: it cannot be read, or is not what the commit holds.
        """
        expected = self.entry(file)
        end = min(end, expected.size)
        if begin >= end:
            return b""
        url = hf_hub_url(self.id, file, revision=self.revision)
        try:
            content = read_bytes(url, begin, end, expected.size, self._headers)
        except UnfitAnswer as error:
            self._refuse(file, str(error))
        except HUB_FAILURES as error:
            raise ConversionError(f"{self.location}: {file} cannot be read: {self._told(error)}") from error
        self._check_as_it_comes(file, begin, content)
        return content

    def _check_as_it_comes(self, file: str, begin: int, content: bytes) -> None:
        """Blocks from the first to the last add up to the file's hash; others wait for the whole file."""
        check = RunningCheck(self._files[file]) if begin == 0 else self._checks.pop(file, None)
        if check is not None and check.position == begin:
            check.take(content)
            if not check.is_complete:
                self._checks[file] = check
            elif (fault := check.fault()) is None:
                self._seen.pop(file, None)
                return
            else:
                self._refuse(file, f"{fault}; its last part read begins with {content[:32]!r}")
        if len(content) < self._files[file].size:
            self._seen.setdefault(file, []).append(SeenRange.of(begin, content))

    @contextmanager
    def local(self, file: str) -> Iterator[Path]:
        """The file, downloaded and checked, for as long as the block lasts; the caller may move it away."""
        self.entry(file)
        with ExitStack() as stack:
            folder = self.download_folder or Path(stack.enter_context(TemporaryDirectory()))
            path = self._download(file, folder)
            yield path
            # Only after use without error: what a broken run has fetched is there to go on from.
            path.unlink(missing_ok=True)

    def fetch(self, files: Iterable[str]) -> Path:
        """Bring files of the commit into the Hub's cache, each checked, also those that were there before.

        What does not hold up is removed from the cache, and fetched once more if it was there before. Under torchrun
        a machine's first process compares contents, the others sizes; none ends without it.

        Args:
            files: of `list_files`.

        Returns:
            The folder in which they lie under their names: the commit's snapshot.

        Raises:
            ConversionError: a file cannot be downloaded, or is not what the commit holds.
        """
        names = list(files)
        pool = ThreadPoolExecutor(min(_FETCHERS, max(1, len(names))))
        try:
            paths = list(pool.map(self._bring, names))
        finally:
            # After a failure, or Ctrl-C, no further file is begun.
            pool.shutdown(wait=True, cancel_futures=True)
        return Path(str(paths[0]).removesuffix(names[0])) if names else Path(constants.HF_HUB_CACHE)

    def _bring(self, file: str) -> Path:
        expected = self.entry(file)
        was_there = isinstance(try_to_load_from_cache(self.id, file, revision=self.revision), str)
        while True:
            path = self._ask_for(file)
            if not path.as_posix().endswith(f"/snapshots/{self.revision}/{file}"):
                self._refuse(file, f"it came as of another commit ({path.parent.name})")
            if file in self._fetched:
                return path
            fault = file_fault(path, expected, self._seen.get(file, ())) if _compares_contents() else None
            if path.stat().st_size != expected.size:
                fault = f"it has {path.stat().st_size} bytes where {expected.size} were due"
            if fault is None:
                self._fetched.add(file)
                return path
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            if not was_there:
                self._refuse(file, fault)
            was_there = False

    def _download(self, file: str, folder: Path) -> Path:
        path = self._ask_for(file, local_dir=folder)
        if (fault := file_fault(path, self._files[file], self._seen.get(file, ()))) is not None:
            path.unlink()
            self._refuse(file, fault)
        return path

    def _ask_for(self, file: str, **where: Any) -> Path:
        def fetch() -> str:
            return str(hf_hub_download(self.id, file, revision=self.revision, token=self._token, **where))

        try:
            return Path(patiently(fetch))
        except HUB_FAILURES as error:
            raise ConversionError(f"{self.location}: {file} cannot be downloaded: {self._told(error)}") from error
        except GARBLED_ANSWERS as error:
            self._refuse(file, str(error))

    def _told(self, error: Exception) -> str:
        # That a file is not in the cache either hides why it did not come.
        reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        return redact(str(reason), self._token)

    def _refuse(self, file: str, fault: str) -> NoReturn:
        raise ConversionError(
            f"{self.location}: {file} did not arrive as commit {str(self.revision)[:8]} holds it: "
            f"{redact(fault, self._token)}. Run it "
            f"again; if that does not help, look for a proxy or mirror that answers in the Hub's place "
            f"(HF_ENDPOINT={constants.ENDPOINT}, HTTPS_PROXY), or fetch the folder elsewhere with "
            f"`hf download {self.id}`"
        )

    def fingerprint(self, file: str) -> list[Any]:
        """The repository, its commit and the file's size."""
        return [self.id, self.revision, self.size(file)]


def _compares_contents() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
