"""Push a finished checkpoint folder to the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from transformers.dynamic_module_utils import get_relative_import_files

from .checkpoint import ConversionError, FolderSource, read_checkpoint
from .hub_source import HUB_FAILURES
from .journal import DOWNLOAD_FOLDER, JOURNAL_FILE
from .shard_writer import PARTIAL_SUFFIX


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a checkpoint as a model repository, after checking that it is whole.

    After an interrupted upload, push again: weights that have arrived are not sent a second time.

    Args:
        folder: the checkpoint.
        repo_id: Hub id, `org/name` or `name` for one's own namespace; the repository is made when absent.
        private: whether a new repository is private; the account's default when `None`. With True, a repository
            that exists and is public is refused.
        revision: branch to push to, made when absent; `main` when `None`.
        token: Hub token; `HF_TOKEN` or the saved login when `None`.
        commit_message: the commit's title.

    Returns:
        The commit's address.

    Raises:
        ConversionError: an unfinished or damaged checkpoint, no token, no permission, or no connection; with the mend.
    """
    check_complete(folder)
    if (token or get_token()) is None:
        raise ConversionError(
            f"no Hub token to push to {repo_id} with: log in with `hf auth login`, set HF_TOKEN, or give --token"
        )
    api = HfApi(token=token, library_name="indexcache")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ConversionError(
                f"{repo_id} exists and is public: make it private in its settings, push to another id, or drop "
                "--private"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(folder),
            revision=revision,
            commit_message=commit_message or "Upload IndexCache checkpoint",
            ignore_patterns=["__pycache__/*", "*.pyc"],
        )
    except HFValidationError as error:
        raise ConversionError(f"{repo_id!r} is no Hub id (org/name): {error}") from error
    except HUB_FAILURES as error:
        raise ConversionError(_explain(error, repo_id)) from error
    except RuntimeError as error:
        # huggingface_hub wraps what went wrong with one file of several.
        if not isinstance(error.__cause__, HUB_FAILURES):
            raise
        raise ConversionError(_explain(error.__cause__, repo_id)) from error
    return str(commit.commit_url)


def check_complete(folder: str | os.PathLike[str]) -> None:
    """Check that a folder is a finished checkpoint: config, every shard in full, and the code that its config names.

    Raises:
        ConversionError: saying what is missing or damaged, and the mend.
    """
    source = FolderSource(folder)
    unfinished = [
        file
        for file in source.list_files()
        if file == JOURNAL_FILE or file.endswith(PARTIAL_SUFFIX) or file.startswith(f"{DOWNLOAD_FOLDER}/")
    ]
    if unfinished:
        raise ConversionError.collect(
            f"{folder} is unfinished: finish it with `indexcache convert` or `distill ... --resume`, or remove these "
            "files if they are strays",
            unfinished,
        )
    auto_map = read_checkpoint(source).config.get("auto_map") or {}
    entries = sorted({f"{reference.partition('.')[0]}.py" for reference in auto_map.values() if "--" not in reference})
    needed = {Path(folder) / file for file in entries}
    missing = sorted(path.name for path in needed if not path.is_file())
    if not missing:
        try:
            for path in needed:
                get_relative_import_files(path)
        except FileNotFoundError as error:
            missing = [Path(error.filename).name]
    if missing:
        raise ConversionError.collect(
            f"{folder} lacks code that loading it with trust_remote_code=True needs: convert or save it again", missing
        )


def _explain(error: Exception, repo_id: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return (
            f"the Hub does not accept the token for {repo_id}: log in again with `hf auth login`, or give another "
            f"with --token ({error})"
        )
    if status == 403:
        return (
            f"the token may not write to {repo_id}: use one with write access to that namespace, or push to another "
            f"id ({error})"
        )
    if status is None:
        return (
            f"the Hub at {constants.ENDPOINT} cannot be reached: check the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
            f"then push again ({error})"
        )
    return f"the Hub did not take the upload to {repo_id}: push again; what has arrived is not sent twice ({error})"
