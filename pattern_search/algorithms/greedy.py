"""Algorithm 1 of IndexCache: greedy search for the indexers that cost least to leave out, every candidate scored.

Bai et al. 2026, arXiv 2603.12201, section 3 and Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ...configuration.share_pattern import FULL, SHARED
from ..measure.evaluator import Evaluation, Evaluator


@dataclass(frozen=True)
class Step:
    """One layer that fell.

    Attributes:
        layer: which.
        pattern: the letters after it fell.
        cost: the objective of that pattern, per token, on the windows that the search looked at.
        candidates: the costs by layer that it was chosen among (layers given up early at the cost they had reached).
    """

    layer: int
    pattern: str
    cost: float
    candidates: dict[int, float] = field(default_factory=dict)


def share(letters: str, layer: int) -> str:
    """The pattern with `layer` made shared."""
    return letters[:layer] + SHARED + letters[layer + 1 :]


def make_full(letters: str, layer: int) -> str:
    """The pattern with `layer` made full."""
    return letters[:layer] + FULL + letters[layer + 1 :]


def removable(letters: str, first: int = 0, last: int | None = None) -> list[int]:
    """The full layers in `first .. last`, the first of them aside: it stays full."""
    last = len(letters) if last is None else last
    return [layer for layer in range(first + 1, last) if letters[layer] == FULL]


def greedy(
    evaluator: Evaluator,
    start: str,
    keep: int = 1,
    blocks: int = 1,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Make layer after layer shared, always the one whose loss is then least; ties go to the smaller layer.

    Args:
        evaluator: scores patterns; with `objective="lm"` this is the paper's algorithm.
        start: the pattern to begin with, all full for a DSA model.
        keep: full layers to end with.
        blocks: pipeline blocks. The layers are split evenly into so many, the first layer of each stays full, and a
            round goes through the blocks, making one layer of each shared: about `blocks` times fewer evaluations.
        on_step: called after every step.

    Returns:
        The steps, each with one full layer less.

    Raises:
        ValueError: fewer full layers asked for than blocks, or more blocks than layers.
    """
    starts = block_starts(len(start), blocks)
    if any(start[first] != FULL for first in starts):
        raise ValueError(f"the first layer of every pipeline block must be full: {starts} in {start!r}")
    if keep < blocks:
        raise ValueError(f"{blocks} pipeline blocks keep {blocks} layers full at least, and {keep} were asked for")
    spans = list(zip(starts, [*starts[1:], len(start)]))
    pattern, steps = start, list[Step]()
    while pattern.count(FULL) > keep:
        before = pattern
        for first, last in spans:
            layers = removable(pattern, first, last)
            if not layers or pattern.count(FULL) <= keep:
                continue
            evaluator.pin(pattern)
            found = evaluator.evaluate_all(share(pattern, layer) for layer in layers)
            best = min(found, key=lambda evaluation: evaluation.cost)
            steps.append(_step(pattern, best, dict(zip(layers, (evaluation.cost for evaluation in found)))))
            pattern = best.pattern
            on_step(steps[-1])
        if pattern == before:
            break
    return steps


def block_starts(num_layers: int, blocks: int) -> list[int]:
    """The first layer of each of `blocks` even blocks."""
    if not 1 <= blocks <= num_layers:
        raise ValueError(f"pipeline blocks must lie in 1 .. {num_layers}, the number of layers (got {blocks})")
    return [block * num_layers // blocks for block in range(blocks)]


def _step(before: str, chosen: Evaluation, candidates: dict[int, float]) -> Step:
    layer = next(layer for layer, (old, new) in enumerate(zip(before, chosen.pattern)) if old != new)
    return Step(layer, chosen.pattern, chosen.cost, candidates)
