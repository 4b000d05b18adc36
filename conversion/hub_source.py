"""A checkpoint on the Hub: headers by HTTP range, then one shard at a time on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from .checkpoint import ConversionError, check_file_name

# The HTTP library's own base error comes with HfHubHTTPError: which library that is depends on huggingface_hub.
HUB_FAILURES = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, EntryNotFoundError, OSError))

# What comes of reading an answer that is not the Hub's own: a proxy's page, an empty body, fields that are not there.
GARBLED_ANSWERS: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, AttributeError)


class HubSource:
    """A model repository at one commit.

    Args:
        repo_id: `org/name`.
        revision: branch, tag or commit; resolved once, so that a push in between changes nothing.
        token: Hub token; the saved login when `None`.

    Raises:
        ConversionError: no such repository or revision, no access, or no connection.
    """

    def __init__(self, repo_id: str, *, revision: str | None = None, token: str | None = None) -> None:
        self.id, self._token = repo_id, token
        self.location = f"Hub repository {repo_id}"
        self._headers = build_hf_headers(token=token)
        #: Where shards are put while they are read; beside the output, so that they can be moved there.
        self.download_folder: Path | None = None
        try:
            info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
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
            raise ConversionError(f"{self.location} cannot be reached: {error}") from error
        self.revision: str | None = info.sha
        self._sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def list_files(self) -> list[str]:
        """All files of the commit, sorted."""
        return sorted(self._sizes)

    def size(self, file: str) -> int:
        """Bytes of one file."""
        check_file_name(file, self.location)
        if file not in self._sizes:
            raise ConversionError(f"{self.location}: {file} is missing")
        return self._sizes[file]

    def read_range(self, file: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of one file, by an HTTP range request."""
        end = min(end, self.size(file))
        if begin >= end:
            return b""
        url = hf_hub_url(self.id, file, revision=self.revision)
        try:
            response = get_session().get(
                url, headers={**self._headers, "range": f"bytes={begin}-{end - 1}"}, timeout=60
            )
            hf_raise_for_status(response)
        except HUB_FAILURES as error:
            raise ConversionError(f"{self.location}: {file} cannot be read: {error}") from error
        body: bytes = response.content
        # A server may ignore the range and send the whole file.
        return body[begin:end] if response.status_code == 200 and len(body) > end - begin else body

    @contextmanager
    def local(self, file: str) -> Iterator[Path]:
        """The file, downloaded for as long as the block lasts; the caller may move it away."""
        self.size(file)
        with ExitStack() as stack:
            folder = self.download_folder or Path(stack.enter_context(TemporaryDirectory()))
            path = self._download(file, folder)
            yield path
            # Only after use without error: what a broken run has fetched is there to go on from.
            path.unlink(missing_ok=True)

    def _download(self, file: str, folder: Path) -> Path:
        try:
            path = hf_hub_download(self.id, file, revision=self.revision, token=self._token, local_dir=folder)
        except HUB_FAILURES as error:
            raise ConversionError(f"{self.location}: {file} cannot be downloaded: {error}") from error
        return Path(path)

    def fingerprint(self, file: str) -> list[Any]:
        """The repository, its commit and the file's size."""
        return [self.id, self.revision, self.size(file)]
