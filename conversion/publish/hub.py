"""Push a finished checkpoint folder to the Hugging Face Hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError

from ..convert.families import FAMILIES, INDEXCACHE, known_families
from ..convert.journal import DOWNLOAD_FOLDER, JOURNAL_FILE
from ..io.checkpoint import CONFIG_FILE, Checkpoint, read_checkpoint, read_json
from ..io.hub_requests import GARBLED_ANSWERS, HUB_FAILURES, redact
from ..io.open_checkpoint import open_checkpoint
from ..io.shard_writer import PARTIAL_SUFFIX
from ..io.sources import ConversionError, FolderSource
from .hub_contents import HubContents, check_no_token, code_files, hub_contents


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    announce: Callable[[HubContents], None] | None = None,
) -> str:
    """Upload a checkpoint as a model repository, after checking that it is whole.

    Only what `hub_contents` lists is sent. After an interrupted upload, push again: weights that have arrived are not
    sent a second time.

    Args:
        folder: the checkpoint.
        repo_id: Hub id, `org/name` or `name` for one's own namespace; the repository is made when absent.
        private: whether a new repository is private; the account's default when `None`. With True, a repository
            that exists and is public is refused.
        revision: branch to push to, made when absent; `main` when `None`.
        token: Hub token; `HF_TOKEN` or the saved login when `None`.
        commit_message: the commit's title.
        create_pr: propose the commit as a pull request against `revision` and change no branch; for a repository
            that exists, of others too.
        announce: called with what will be sent and what stays, before the Hub is spoken to.

    Returns:
        The commit's address, or the pull request's.

    Raises:
        ConversionError: an unfinished or damaged checkpoint, a token among its files, no token, no permission, a card
            that the Hub refuses, or no connection; with the mend.
    """
    contents = check_contents(folder, token)
    if announce is not None:
        announce(contents)
    require_token(repo_id, token)
    api = HfApi(token=token, library_name="indexcache")
    with hub_errors(repo_id, token, Path(folder) / "README.md"):
        if not create_pr:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ConversionError(
                f"{repo_id} exists and is public: make it private in its settings, push to another id, or drop "
                "--private"
            )
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(folder),
            revision=revision,
            commit_message=commit_message or "Upload IndexCache checkpoint",
            create_pr=create_pr,
            # Patterns, not names, are what it takes.
            allow_patterns=[glob.escape(name) for name in contents.files],
        )
    return str(commit.pr_url if create_pr else commit.commit_url)


def require_token(repo_id: str, token: str | None) -> None:
    """ConversionError when there is no token to write to `repo_id` with."""
    if (token or get_token()) is None:
        raise ConversionError(
            f"no Hub token to push to {repo_id} with: log in with `hf auth login`, set HF_TOKEN, or give --token"
        )


@contextmanager
def hub_errors(repo_id: str, token: str | None, card: Path | None = None) -> Iterator[None]:
    """Turns what goes wrong in a write to `repo_id`, with `card` among its files, into ConversionErrors."""
    try:
        yield
    except ConversionError:
        raise
    except HFValidationError as error:
        raise ConversionError(f"{repo_id!r} is no Hub id (org/name): {error}") from error
    except HUB_FAILURES as error:
        raise ConversionError(redact(_explain(error, repo_id), token)) from error
    except RuntimeError as error:
        # huggingface_hub wraps what went wrong with one file of several.
        if not isinstance(error.__cause__, HUB_FAILURES):
            raise
        raise ConversionError(redact(_explain(error.__cause__, repo_id), token)) from error
    except GARBLED_ANSWERS as error:
        raise ConversionError(redact(_explain_answer(error, repo_id, card), token)) from error


def check_contents(folder: str | os.PathLike[str], token: str | None = None) -> HubContents:
    """What a push of this folder would send, after every check that needs no Hub.

    Raises:
        ConversionError: an unfinished or damaged checkpoint, or a Hub token among its files.
    """
    contents = hub_contents(check_complete(folder), folder)
    check_no_token(contents, token or get_token())
    return contents


def check_complete(folder: str | os.PathLike[str]) -> Checkpoint:
    """Check that a folder is a finished checkpoint: every shard in full, the code, and weights as the config says.

    Returns:
        The checkpoint, by its headers.

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
            f"{folder} is unfinished: finish it with `indexcache convert` or `distill ... --resume`, or with "
            "`refresh` again, or remove these files if they are strays",
            unfinished,
        )
    # An export for another engine is checked by that engine's rules, which are not known here.
    model_type = read_json(source, CONFIG_FILE).get("model_type")
    if model_type != INDEXCACHE and (not isinstance(model_type, str) or model_type not in FAMILIES):
        raise ConversionError(
            f"{source.location}: config.json has model_type={model_type!r}, and what is pushed is an IndexCache "
            f"checkpoint or an export of one (accepted: {known_families()}): fix the config, or convert again"
        )
    checkpoint = open_checkpoint(source).checkpoint if model_type == INDEXCACHE else read_checkpoint(source)
    code_files(checkpoint, Path(folder))
    return checkpoint


def _explain_answer(error: Exception, repo_id: str, card: Path | None) -> str:
    """huggingface_hub passes on what the Hub says of the card as a ValueError; others come of foreign answers."""
    if getattr(getattr(error.__cause__, "response", None), "status_code", None) == 400:
        what = card or "it"
        return f"the Hub does not take {what}: fix the metadata between its `---` lines and push again ({error})"
    return (
        f"{constants.ENDPOINT} answers as no Hub does ({type(error).__name__}: {error}) when pushing to {repo_id}: is "
        "a proxy in between, or HF_ENDPOINT wrong? Push again once it is fixed"
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
    if status == 412:
        return f"somebody has committed to {repo_id} in the meantime: run it again on what is there now ({error})"
    if status is None:
        return (
            f"the Hub at {constants.ENDPOINT} cannot be reached: check the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
            f"then push again ({error})"
        )
    return f"the Hub did not take the upload to {repo_id}: push again; what has arrived is not sent twice ({error})"
