"""Refine a pattern at one number of full layers: bring back a layer that should not have fallen, drop another.

The moves of floating search (Pudil, Novovicova and Kittler 1994) and shifts of single full layers. Greedy search never
takes a step back; these moves do.
"""

from __future__ import annotations

from collections.abc import Callable

from ...configuration.share_pattern import SharePattern
from ..measure.evaluator import Evaluation, Evaluator
from .greedy import make_full, removable, share
from .lazy_greedy import Race

# Returning layers that are tried with every layer to drop; how far a full layer is shifted; and how many of the moves,
# the best of one round of windows, are scored on more.
RETURNING, SHIFT, FINALISTS = 2, 1, 4


def refine(
    evaluator: Evaluator,
    pattern: str,
    passes: int = 2,
    by_loss: bool = False,
    on_move: Callable[[Evaluation, Evaluation], None] = lambda before, after: None,
) -> Evaluation:
    """Move full layers while that makes the pattern better.

    Args:
        evaluator: scores patterns, on all its windows.
        pattern: where to begin; its number of full layers stays.
        passes: moves to make at most.
        by_loss: better is a lower language-model loss; otherwise the evaluator's objective decides. Loss is what one
            wants and KL what a few windows can measure: its differences between patterns are two to three times less
            noisy.
        on_move: called with the patterns before and after each move.

    Returns:
        The evaluation of the best pattern found, complete.
    """
    best = evaluator.evaluate(pattern, by_loss=by_loss)
    for _ in range(passes):
        evaluator.pin(best.pattern)
        race = Race(evaluator, len(evaluator.rounds), leader=best, by_loss=by_loss)
        finalists = moves(evaluator, best.pattern, by_loss)[:FINALISTS]
        for place, candidate in enumerate(finalists):
            race.expect(finalists[place:])
            race.run(candidate)
        if race.leader is None or race.leader.pattern == best.pattern:
            break
        on_move(best, race.leader)
        best = race.leader
    return best


def moves(evaluator: Evaluator, letters: str, by_loss: bool = False) -> list[str]:
    """Patterns with as many full layers that are worth a look, the most promising first by one round of windows.

    They are all that drop one layer for one of the best returning ones, and those that shift one full layer.
    """

    def first_round(pattern: str) -> float:
        return evaluator.evaluate(pattern, rounds=1, by_loss=by_loss).least_cost

    pattern = SharePattern(letters)
    allowed = [layer for layer in pattern.shared_layers if evaluator.reference.is_full(layer)]
    evaluator.expect({make_full(letters, layer): 1 for layer in allowed})
    gains = {layer: first_round(make_full(letters, layer)) for layer in allowed}
    returning = sorted(gains, key=lambda layer: (gains[layer], layer))[:RETURNING]
    swaps = {share(make_full(letters, back), layer): None for back in returning for layer in removable(letters)}
    for layer in removable(letters):
        for target in range(layer - SHIFT, layer + SHIFT + 1):
            if target in gains:
                swaps[share(make_full(letters, target), layer)] = None
    evaluator.expect(dict.fromkeys(swaps, 1))
    found = {swap: first_round(swap) for swap in swaps}
    return sorted(found, key=lambda swap: found[swap])
