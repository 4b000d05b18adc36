"""A checkpoint's tokenizer, and what is needed of one."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol, cast

from ...conversion.convert.companion_files import companion_files
from ...conversion.io.checkpoint import CONFIG_FILE, read_json
from ...conversion.io.hub_source import HubSource
from ...conversion.io.open_checkpoint import open_source
from ...conversion.io.sources import ConversionError, FolderSource, Source

# A checkpoint without one of these has no tokenizer.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """Token ids of `text`."""
        ...


class UnusableTokenizer:
    """In place of a tokenizer that cannot be loaded: whatever is asked of it raises the reason.

    So windows of tokens are read without it, and text is not.

    Args:
        reason: that names the file or the request, and what is wrong.
    """

    def __init__(self, reason: ConversionError) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> NoReturn:
        raise self._reason

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises the reason."""
        raise self._reason


def load_tokenizer(source: str | Source, *, revision: str | None = None, token: str | None = None) -> Tokenizer | None:
    """A checkpoint's tokenizer; None when it has none; an `UnusableTokenizer` for one that cannot be loaded.

    Of a Hub repository the files are fetched into the Hub's cache and compared with the commit's sizes and hashes
    before they are read.

    Args:
        source: a folder, a Hub id, or what `open_source` made of one.
        revision: branch, tag or commit of a Hub id.
        token: for the Hub.
    """
    opened = open_source(source, revision=revision, token=token) if isinstance(source, str) else source
    files = opened.list_files()
    if not any(name in files for name in _FILES):
        return None
    try:
        return _load(opened, files)
    except ConversionError as error:
        return cast(Tokenizer, UnusableTokenizer(error))


def _load(source: Source, files: list[str]) -> Tokenizer:
    from transformers import AutoTokenizer

    if isinstance(source, FolderSource):
        folder = source.folder
    else:
        assert isinstance(source, HubSource)
        wanted = [CONFIG_FILE, *companion_files(files), *_FILES]
        folder = source.fetch([name for name in dict.fromkeys(wanted) if name in files])
    try:
        for name in {"tokenizer_config.json", "special_tokens_map.json"}.intersection(files):
            _check_names(read_json(source, name), name)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        _check_settings(tokenizer)
        tokenizer.encode("a b", add_special_tokens=False, verbose=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions at damaged files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConversionError(
            f"the tokenizer of {source.location} cannot be loaded: {reason}. Fix tokenizer.json and "
            "tokenizer_config.json, or give windows in .safetensors"
        ) from error
    return cast(Tokenizer, tokenizer)


def _check_names(value: Any, where: str) -> None:
    """ValueError for names of settings with control characters: the tokenizers library prints unknown ones."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not name.isprintable():
                raise ValueError(f"{where} has a setting called {name!r}")
            _check_names(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _check_names(inner, where)


def _check_settings(tokenizer: Any) -> None:
    """ValueError for values of tokenizer_config.json that transformers takes as they are and fails at later."""
    length, end = tokenizer.model_max_length, tokenizer.eos_token_id
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise ValueError(f"tokenizer_config.json has model_max_length={length!r}, which is no number")
    if end is not None and (isinstance(end, bool) or not isinstance(end, int)):
        raise ValueError(f"tokenizer_config.json has an end-of-text token whose id is {end!r}, which is no number")
