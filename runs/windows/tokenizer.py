"""A checkpoint's tokenizer, and what is needed of one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Protocol

# A folder without one of these has no tokenizer.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """Token ids of `text`."""
        ...


def load_tokenizer(source: str, *, revision: str | None = None, token: str | None = None) -> Tokenizer | None:
    """A checkpoint's tokenizer, or None when it has none; of one that cannot be loaded, a warning says why."""
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, token=token)
    except Exception as error:  # the tokenizers library raises bare Exceptions at damaged files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(f"the tokenizer of {source} cannot be loaded: {reason}", stacklevel=2)
        return None
    return tokenizer
