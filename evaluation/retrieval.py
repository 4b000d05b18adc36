"""Retrieval by context length and depth: facts are noted in a long text and asked for at its end.

Two kinds of prompts. `records`: lines "note: mapi is jeqe." at every depth of one text, all asked for at its end in
random order ("recall: mapi is"), so that one forward pass tests all depths. `passkey`: one number per text, stated
and asked for in plain words, one forward pass per depth (the test of Mohtashami and Jaggi 2023, arXiv 2305.16300).

An answer counts when every one of its tokens is the model's first choice given the tokens before it: exactly when
greedy decoding would write it. So no generation is needed.

Legend: B prompts of a batch, L tokens per prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from transformers import PreTrainedModel

from ..runs.errors import RunError
from ..runs.windows.tokenizer import Tokenizer

KINDS = ("records", "passkey")
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
# What stands between the facts unless there is text.
_FILLER = (
    "The road follows the river down to the harbour. Boats come in with the tide and leave again before it turns. "
    "In the morning the market opens, and in the evening the lamps are lit along the quay. "
)


@dataclass(frozen=True)
class Prompt:
    """A text that notes facts and asks for them.

    Attributes:
        ids: its tokens, answers included.
        answers: where each answer stands, as ranges of tokens, ordered by depth.
        depths: how far into the text each fact was noted, 0 at its start to 1 just before the questions.
    """

    ids: list[int]
    answers: list[range]
    depths: list[float]


class PromptMaker:
    """Makes prompts of exactly so many tokens.

    Args:
        tokenizer: of the model.
        kind: `records` or `passkey`.
        depths: how many depths, evenly from start to end.
        filler: tokens that stand between the facts; repeated sentences when None.
    """

    def __init__(
        self, tokenizer: Tokenizer, kind: str = "records", depths: int = 5, filler: Sequence[int] | None = None
    ) -> None:
        if kind not in KINDS:
            raise RunError(f"prompts are {' or '.join(KINDS)} (got {kind!r})")
        if depths < 1:
            raise RunError(f"--depths must be at least 1 (got {depths})")
        self.kind = kind
        self.depths = [i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5]
        self._tokenizer = tokenizer
        self._filler = list(filler) if filler else self._encode(_FILLER)

    def make(self, length: int, sample: int, seed: int = 0) -> list[Prompt]:
        """The prompts of one sample: one with all depths (`records`), or one per depth (`passkey`).

        Raises:
            RunError: `length` tokens do not hold the facts and the questions.
        """
        draw = random.Random(f"{seed}/{length}/{sample}")
        start = draw.randrange(len(self._filler))
        match self.kind:
            case "records":
                return [self._records(length, draw, start)]
            case "passkey":
                return [self._passkey(length, depth, draw, start) for depth in self.depths]
        raise NotImplementedError(f"prompts of the kind {self.kind!r}")

    def _records(self, length: int, draw: random.Random, start: int) -> Prompt:
        words: dict[str, None] = {}
        while len(words) < 2 * len(self.depths):
            words["".join(draw.choice(letters) for letters in (_CONSONANTS, _VOWELS) * 2)] = None
        names = list(words)
        facts = list(zip(names[::2], names[1::2]))
        notes = [
            self._encode(f"\nnote: {name} is") + self._encode(f" {value}") + self._encode(".\n")
            for name, value in facts
        ]
        order = draw.sample(range(len(facts)), len(facts))
        questions = [
            (self._encode(f"\nrecall: {facts[i][0]} is"), self._encode(f" {facts[i][1]}"), self._encode(".\n"))
            for i in order
        ]
        # Nothing follows the last answer.
        questions[-1] = (*questions[-1][:2], [])
        asked = sum(len(part) for question in questions for part in question)
        ids = self._text(length - asked, [], list(zip(self.depths, notes)), start)
        answers: dict[int, range] = {}
        for i, (question, answer, stop) in zip(order, questions):
            ids += question
            answers[i] = range(len(ids), len(ids) + len(answer))
            ids += answer + stop
        return Prompt(ids, [answers[i] for i in range(len(facts))], self.depths)

    def _passkey(self, length: int, depth: float, draw: random.Random, start: int) -> Prompt:
        key = str(draw.randrange(10000, 100000))
        task = self._encode(
            "There is a pass key hidden in the text below. Find it and remember it: it will be asked for at the end."
            "\n\n"
        )
        fact = self._encode("\nThe pass key is") + self._encode(f" {key}") + self._encode(f". Remember it: {key}.\n")
        question = self._encode("\n\nWhat is the pass key? The pass key is")
        answer = self._encode(f" {key}")
        ids = self._text(length - len(question) - len(answer), task, [(depth, fact)], start) + question
        return Prompt(ids + answer, [range(len(ids), len(ids) + len(answer))], [depth])

    def _text(self, length: int, head: list[int], facts: list[tuple[float, list[int]]], start: int) -> list[int]:
        """`head` and filler with the facts in it, `length` tokens."""
        room = length - len(head) - sum(len(fact) for _, fact in facts)
        if room < len(facts):
            shortest = length - room + len(facts)
            raise RunError(
                f"a prompt of {length:,} tokens before its questions does not hold what is noted and filler between: "
                f"give a --length at least {shortest - length:,} tokens longer, or fewer --depths"
            )
        filler = list(islice(cycle(self._filler), start, start + room))
        ids, used = list(head), 0
        for depth, fact in facts:
            place = round(depth * room)
            ids += filler[used:place] + fact
            used = place
        return ids + filler[used:]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)


@torch.inference_mode()
def recalled(model: PreTrainedModel, prompts: Sequence[Prompt], batch_size: int = 1) -> list[list[bool]]:
    """Which answers the model gives, prompt by prompt, ordered by depth.

    Logits are made at the answers only, so that memory does not grow with length times vocabulary.

    Args:
        model: a causal language model, as for `evaluate_windows`.
        prompts: of any lengths; those of one length share forward passes.
        batch_size: prompts in one forward pass.
    """
    found: list[list[bool]] = [[] for _ in prompts]
    head = model.get_output_embeddings()
    was_training = model.training
    model.eval()
    try:
        for chosen in _batches(prompts, batch_size):
            ids = torch.tensor([prompts[i].ids for i in chosen], device=model.device)
            hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            for row, i in enumerate(chosen):
                for answer in prompts[i].answers:
                    logits = head(hidden[row, answer.start - 1 : answer.stop - 1].to(head.weight.device))
                    targets = ids[row, answer.start : answer.stop].to(logits.device)
                    found[i].append(bool((logits.argmax(-1) == targets).all()))
    finally:
        model.train(was_training)
    return found


def _batches(prompts: Sequence[Prompt], batch_size: int) -> Iterable[list[int]]:
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.ids), []).append(i)
    for members in by_length.values():
        for first in range(0, len(members), batch_size):
            yield members[first : first + batch_size]
