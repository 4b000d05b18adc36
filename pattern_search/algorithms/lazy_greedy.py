"""Greedy search that scores few candidates per step: last known costs decide which are worth another look.

What a layer costs when it falls changes little from step to step, except where the last fall changed who reads whose
selection. So a step looks at candidates in the order of the costs they had when last scored, and commits the best
fresh one once no other, even with a stated slack on its stale cost, could beat it. Candidates are left off early by
two rules, both in `Race`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ...configuration.share_pattern import FULL, SharePattern
from ...evaluation.perplexity import paired_rise
from ..measure.evaluator import Evaluation, Evaluator
from .greedy import Step, removable, share

# A stale cost may turn out smaller by this share of itself.
SLACK = 0.3
# Windows and standard errors after which a candidate that trails the leader on the same windows is given up.
TRAILING_WINDOWS, TRAILING_ERRORS = 4, 2.5


@dataclass
class Race:
    """Evaluations one after the other, of which only the cheapest pattern matters.

    A candidate is left off after a round of windows when

    - its sum over the windows run already exceeds the leader's over all windows. Costs of windows are never negative,
      so it is certain to lose;
    - or it trails the leader, window by window, by more than `TRAILING_ERRORS` standard errors of the mean difference
      after at least `TRAILING_WINDOWS` windows. A better candidate is lost so with a chance of about 5 % at four
      windows and 2 % at eight (Student's t, one-sided), and only if the windows run were unlike the others.

    Attributes:
        evaluator: scores patterns.
        rounds: of windows to run, at most.
        leader: the best so far.
        by_loss: judge by language-model loss, whatever the evaluator's objective.
    """

    evaluator: Evaluator
    rounds: int
    leader: Evaluation | None = None
    by_loss: bool = False

    def run(self, pattern: str) -> Evaluation:
        """Score a pattern as far as it matters, and make it the leader if it is cheaper."""
        leader = self.leader
        found = self.evaluator.evaluate(
            pattern,
            rounds=self.rounds,
            by_loss=self.by_loss,
            stop_above=math.inf if leader is None else leader.least_cost,
            give_up=None if leader is None else lambda so_far: trails(so_far.costs, leader.costs),
        )
        if leader is None or (len(found.costs) == len(leader.costs) and found.least_cost < leader.least_cost):
            self.leader = found
        return found

    def expect(self, patterns: list[str]) -> None:
        """Say which patterns may be run next: new ones for a round, others, as far as they have a chance, for two."""
        wanted: dict[str, int] = {}
        for pattern in patterns:
            seen, found = self.evaluator.known(pattern, self.rounds, self.by_loss)
            if found is None:
                wanted[pattern] = 1
            elif self.leader is None or not (
                found.least_cost > self.leader.least_cost or trails(found.costs, self.leader.costs)
            ):
                wanted[pattern] = min(seen + 2, self.rounds)
        self.evaluator.expect(wanted)


def trails(costs: list[float], leader: list[float]) -> bool:
    """Whether a candidate's costs per window are above the leader's on the same windows by more than chance."""
    if min(len(costs), len(leader)) < TRAILING_WINDOWS:
        return False
    mean, error = paired_rise(costs, leader)
    return error is not None and mean > TRAILING_ERRORS * error


def lazy_greedy(
    evaluator: Evaluator,
    start: str,
    keep: int = 1,
    rounds: int | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Make layer after layer shared, with arguments and result as `greedy`, and few evaluations per step.

    At most so many `rounds` of windows decide; all when None.
    """
    rounds = min(rounds or len(evaluator.rounds), len(evaluator.rounds))
    evaluator.pin(start)
    evaluator.expect({start: rounds, **{share(start, layer): 1 for layer in removable(start)}})
    current = evaluator.evaluate(start, rounds=rounds)
    stale = {layer: _rise(evaluator.evaluate(share(start, layer), rounds=1), current) for layer in removable(start)}
    suspects: set[int] = set()
    steps: list[Step] = []
    while current.pattern.count(FULL) > keep and stale:
        evaluator.pin(current.pattern)
        race = Race(evaluator, rounds)
        order = sorted(stale, key=lambda layer: (stale[layer], layer))
        for place, layer in enumerate(order):
            to_beat = stale[order[0]] if race.leader is None else _rise(race.leader, current)
            chances = [one for one in order[place:] if one in suspects or _bound(stale[one]) < to_beat]
            if race.leader is not None and layer not in chances:
                continue
            race.expect([share(current.pattern, one) for one in chances])
            stale[layer] = _rise(race.run(share(current.pattern, layer)), current)
        assert race.leader is not None
        fallen = next(layer for layer in stale if race.leader.pattern[layer] != current.pattern[layer])
        step = Step(fallen, race.leader.pattern, race.leader.cost, dict(sorted(stale.items())))
        suspects = neighbours(current.pattern, fallen)
        current = race.leader
        del stale[fallen]
        steps.append(step)
        on_step(step)
    return steps


def neighbours(letters: str, fallen: int) -> set[int]:
    """The full layers whose own fall means something else once `fallen` is shared: the ones before and behind it."""
    full = SharePattern(letters).full_layers
    place = full.index(fallen)
    return {full[place - 1], *full[place + 1 : place + 2]}


def _bound(stale: float) -> float:
    """What a candidate of this stale cost may cost now, at least."""
    return stale - SLACK * abs(stale)


def _rise(candidate: Evaluation, current: Evaluation) -> float:
    """What a candidate costs more than the current pattern on the windows it was run on, per window."""
    seen = len(candidate.costs)
    return (math.fsum(candidate.costs) - math.fsum(current.costs[:seen])) / seen / candidate.tokens
