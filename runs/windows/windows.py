"""Fixed windows of tokens that every pattern is scored on, and what marks them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ..errors import RunError

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def refuse_foreign_tokens(ids: torch.Tensor, vocab_size: int, holder: str, model: str = "the model") -> None:
    """Check that a model's vocabulary has the tokens `ids`.

    Args:
        ids: integers of any shape.
        vocab_size: of the model.
        holder: the beginning of the message, such as "FILE holds".
        model: what the message calls it.

    Raises:
        RunError: a token is negative or too large.
    """
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise RunError(
            f"{holder} tokens {low} .. {high}, {model} knows 0 .. {vocab_size - 1}: the windows were made with "
            "another tokenizer"
        )


def tokens_sha256(ids: torch.Tensor, marks: torch.Tensor | None) -> str:
    """A hash of tokens, in the dtype they have, and of what marks them."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    for tensor in (ids, marks):
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Windows:
    """Windows of tokens; token i+1 is predicted from tokens 0 .. i.

    Attributes:
        ids: integers `[N, L + 1]`.
        recall: bool `[N, L + 1]`, True where a token must be recalled from far back; None when nothing is marked.
        origin: where they came from, for reports.
    """

    ids: torch.Tensor
    recall: torch.Tensor | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        integers = self.ids.dtype in INTEGERS
        if self.ids.dim() != 2 or self.ids.shape[0] < 1 or self.ids.shape[1] < 2 or not integers:
            raise RunError(
                f"{self.origin or 'windows'}: ids must be integers of shape [windows, tokens + 1] with at least one "
                f"window of two tokens (got {self.ids.dtype} {tuple(self.ids.shape)})"
            )
        if self.recall is not None and self.recall.shape != self.ids.shape:
            raise RunError(
                f"{self.origin or 'windows'}: the recall mask must have the shape of ids, {tuple(self.ids.shape)} "
                f"(got {tuple(self.recall.shape)})"
            )

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens that enter the model."""
        return self.ids.shape[1] - 1

    @property
    def recall_tokens(self) -> int:
        """Tokens marked for recall, the unpredicted first column aside."""
        return 0 if self.recall is None else int(self.recall[:, 1:].sum())

    def select(self, part: slice | torch.Tensor | tuple[slice, slice]) -> Windows:
        """Some of the windows, or of rows and columns some of each."""
        return Windows(self.ids[part], None if self.recall is None else self.recall[part], self.origin)

    def sha256(self) -> str:
        """A hash of the tokens and the marks."""
        return tokens_sha256(self.ids.long(), None if self.recall is None else self.recall.bool())
