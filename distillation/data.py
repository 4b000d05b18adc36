"""Training data: windows of tokens, read once in order, from text, JSONL, a dataset or a file of windows.

Legend: N windows, L tokens per window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from ..runs.errors import RunError
from ..runs.windows.text_sources import Document, documents_of
from ..runs.windows.tokenizer import Tokenizer
from ..runs.windows.window_sources import (
    DEFAULT_SAMPLES,
    Sampling,
    default_seqlen,
    part_size,
    read_windows,
    windows_named,
    windows_of_file,
)
from ..runs.windows.windows import Windows, refuse_foreign_tokens, tokens_sha256
from .recipe import Recipe

IGNORED = -100


@dataclass(frozen=True)
class TrainingWindows(Dataset):
    """Windows as a dataset of model inputs; token i+1 is predicted from tokens 0 .. i.

    Attributes:
        ids: int32 `[N, L + 1]`.
        starts: bool `[N, L + 1]`, True where a document begins that shall see nothing before it; None: windows are
            whole.
        origin: where they came from.
    """

    ids: torch.Tensor
    starts: torch.Tensor | None = None
    origin: str = ""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens that enter the model."""
        return self.ids.shape[1] - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `shift_labels` `[L]`, and `position_ids` where documents are kept apart."""
        row = self.ids[index].long()
        item = {"input_ids": row[:-1], "labels": row[:-1], "shift_labels": row[1:]}
        if self.starts is not None:
            starts = self.starts[index]
            slots = torch.arange(self.seqlen)
            item["position_ids"] = slots - slots.where(starts[:-1], 0).cummax(0).values
            # What follows a document's end belongs to another.
            item["shift_labels"] = row[1:].masked_fill(starts[1:], IGNORED)
        return item

    def sha256(self) -> str:
        """A hash of the tokens and the documents' starts."""
        return tokens_sha256(self.ids, self.starts)


def load_training_data(
    data: str,
    held_out: str | None,
    config: Any,
    tokenizer: Tokenizer | None,
    recipe: Recipe,
    sampling: Sampling,
    processes: int = 1,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> tuple[TrainingWindows, Windows | None]:
    """Windows to train on, and held-out windows where they are given.

    Args:
        data: a text file, `.jsonl`, `.safetensors` with `NAME_ids` windows (`FILE:NAME` chooses), or a dataset's name.
        held_out: the same, for the evaluation before and after.
        config: of the model: `index_topk`, `max_position_embeddings`, `vocab_size`.
        tokenizer: for text; None will do for windows.
        recipe: steps, batches, tokens per window.
        sampling: `split` and `text_field` of the data, `nsamples` and `seed` of the held-out windows.
        processes: how many share a step.
        on_tokens: called with the tokens read so far.

    Raises:
        RunError: unreadable or too little data, tokens outside the vocabulary, held-out windows that are trained on.
    """
    seqlen = recipe.seqlen or default_seqlen(config.max_position_embeddings, config.index_topk)
    wanted = (recipe.dense_steps + recipe.sparse_steps) * recipe.accumulation * recipe.batch_size * processes
    if named := windows_named(data):
        if recipe.isolate_documents:
            raise RunError(
                f"{data} holds windows and does not say where documents begin: give text for --isolate-documents"
            )
        found = windows_of_file(*named, Sampling(seqlen=recipe.seqlen), None)
        # Before the cast, which would take 2**32 off a token until the model knows it.
        refuse_foreign_tokens(found.ids, config.vocab_size, f"{data} holds")
        windows = TrainingWindows(found.ids.to(torch.int32), None, found.origin)
    else:
        documents = documents_of(data, tokenizer, split=sampling.split, field=sampling.text_field)
        assert tokenizer is not None
        windows = pack_documents(documents, tokenizer, seqlen, wanted, recipe.isolate_documents, data, on_tokens)
    if len(windows) < recipe.batch_size * processes:
        raise RunError(
            f"{data} gives {len(windows)} windows of {windows.seqlen + 1:,} tokens, fewer than the "
            f"{recipe.batch_size * processes} of one micro-batch: give more data, or a smaller --batch-size or "
            "--seqlen"
        )
    refuse_foreign_tokens(windows.ids, config.vocab_size, f"{data} holds")
    if held_out is None:
        return windows, None
    checks = read_windows(held_out, tokenizer, sampling, windows.seqlen, sampling.nsamples or DEFAULT_SAMPLES)
    refuse_foreign_tokens(checks.ids, config.vocab_size, f"{held_out} holds")
    trained = {row.numpy().tobytes() for row in windows.ids}
    both = sum(row.to(torch.int32).numpy().tobytes() in trained for row in checks.ids)
    if both:
        raise RunError(f"{both} held-out windows are trained on too: give --held-out other data than --data")
    return windows, checks


def pack_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    seqlen: int,
    wanted: int,
    isolate: bool = False,
    origin: str = "",
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> TrainingWindows:
    """Documents one after the other, each followed by the end-of-text token, cut into windows of `seqlen + 1` tokens.

    Reading stops when there are `wanted` windows. A document longer than `part_size` is tokenised part by part.

    Raises:
        RunError: less than one window.
    """
    size = seqlen + 1
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[torch.Tensor] = []
    starts: list[int] = []
    total = 0
    for document in documents:
        starts.append(total)
        for part in document.parts(part_size(size)):
            tokens = tokenizer.encode(part, add_special_tokens=False, verbose=False)
            pieces.append(torch.tensor(tokens, dtype=torch.int32))
            total += len(tokens)
            on_tokens(total)
            if total >= wanted * size:
                break
        pieces.append(torch.tensor(end, dtype=torch.int32))
        total += len(end)
        if total >= wanted * size:
            break
    if total < size:
        raise RunError(
            f"{origin} gives {total:,} tokens, less than one window of {size:,} (--seqlen {seqlen:,} and the token "
            "after it): give more text or a shorter --seqlen"
        )
    count = min(wanted, total // size)
    ids = torch.cat(pieces)[: count * size].view(count, size)
    if not isolate:
        return TrainingWindows(ids, None, origin)
    marks = torch.zeros(count * size, dtype=torch.bool)
    inside = torch.tensor(starts)
    marks[inside[inside < count * size]] = True
    marks = marks.view(count, size)
    marks[:, 0] = True
    return TrainingWindows(ids, marks, origin)
