"""A tolerance on loss is one on retrieval, too: a pattern that no longer finds what stands far back is never chosen.

The mean loss of a text hardly notices a few lost facts: on `dsa_small` patterns with half the recall of the source
raise it by a tenth. So whatever a tolerance would choose must also recall what the source recalls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..evaluation.retrieval import Prompt, PromptMaker
from ..runs.errors import RunError
from ..runs.windows.tokenizer import Tokenizer
from ..runs.windows.windows import Windows

DEFAULT_LEAST_RECALL = 0.9
# Of prompts: windows, and facts in each, fewer where so many do not fit.
WINDOWS, FACTS = 8, (8, 4, 2, 1)
# A source that recalls less gives nothing to hold patterns to.
SENSIBLE_RECALL = 0.3


@dataclass
class RetrievalGuard:
    """Says which patterns keep what the source recalls.

    Attributes:
        recall: of a pattern, 0 to 1.
        start: the source's own pattern.
        least: the share of tokens that a pattern must recall; of what the source recalls, where that is less.
        found: recall by pattern, of those that were asked about.
        refused: patterns that would have been chosen by their loss: pattern, loss and recall.
    """

    recall: Callable[[str], float]
    start: str
    least: float
    found: dict[str, float] = field(default_factory=dict)
    refused: list[dict[str, Any]] = field(default_factory=list)

    @property
    def needed(self) -> float | None:
        """What a pattern must recall; None where the source recalls too little to say."""
        source = self._recall_of(self.start)
        if source < SENSIBLE_RECALL:
            return None
        return self.least if source >= self.least else self.least * source

    def allows(self, pattern: str, loss: float) -> bool:
        """Whether a pattern that its `loss` speaks for recalls enough; what does not is noted."""
        if self.needed is None or pattern == self.start or self._recall_of(pattern) >= self.needed:
            return True
        if all(pattern != entry["pattern"] for entry in self.refused):
            self.refused.append({"pattern": pattern, "loss": loss, "recall": self.found[pattern]})
        return False

    def record(self, windows: Windows) -> dict[str, Any]:
        """What was asked on `windows`, as JSON values."""
        return {
            "origin": windows.origin,
            "windows": len(windows),
            "seqlen": windows.seqlen,
            "sha256": windows.sha256(),
            "least_recall": self.least,
            "needed": self.needed,
            "source": self._recall_of(self.start),
            "patterns": dict(self.found),
            "refused": list(self.refused),
        }

    def _recall_of(self, pattern: str) -> float:
        if pattern not in self.found:
            self.found[pattern] = self.recall(pattern)
        return self.found[pattern]


def retrieval_windows(tokenizer: Tokenizer, held_out: Windows) -> Windows:
    """Windows as long as those held out, cut from them, in which facts are noted and asked for at the end.

    Args:
        tokenizer: of the model.
        held_out: text that stands between the facts.

    Raises:
        RunError: not even one fact fits.
    """
    filler = held_out.ids.flatten().tolist()
    problem: RunError | None = None
    for facts in FACTS:
        try:
            maker = PromptMaker(tokenizer, "records", facts, filler)
            prompts = [maker.make(held_out.seqlen + 1, sample)[0] for sample in range(WINDOWS)]
        except RunError as error:
            problem = error
            continue
        return _marked(prompts, f"{facts} facts noted in each, between {held_out.origin}")
    raise RunError(f"windows of {held_out.seqlen:,} tokens hold no question: {problem}")


def _marked(prompts: Sequence[Prompt], origin: str) -> Windows:
    ids = torch.tensor([prompt.ids for prompt in prompts])
    marks = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        for answer in prompt.answers:
            marks[row, answer.start : answer.stop] = True
    return Windows(ids, marks, origin)


def lost_retrieval(curve: Sequence[dict[str, Any]], patterns: dict[int, str], start: str, least: float) -> list[str]:
    """Warnings of patterns asked for that recall too little of the held-out windows, where tokens of them are marked.

    Args:
        curve: of the result.
        patterns: asked for, by number of full layers.
        start: the source's pattern.
        least: see `RetrievalGuard`.
    """
    known = {entry["pattern"]: entry["held_out"].get("recall") for entry in curve if "held_out" in entry}
    if known.get(start) is None:
        return []
    guard = RetrievalGuard(lambda pattern: known[pattern] or 0.0, start, least)
    return [
        f"the pattern with {count} full layers loses retrieval: it recalls {guard.found[pattern]:.1%} of what is "
        f"marked, {guard.needed:.1%} is needed, and the source recalls {guard.found[start]:.1%}"
        for count, pattern in sorted(patterns.items(), reverse=True)
        if known.get(pattern) is not None and not guard.allows(pattern, 0.0)
    ]
