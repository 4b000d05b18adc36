"""Tiny searches: random models small enough to score every pattern, and an evaluator that needs no model."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import torch
from testing.tiny_models import tiny_model

from indexcache import SharePattern
from indexcache.pattern_search.measure.evaluator import Evaluation, Evaluator
from indexcache.pattern_search.measure.prefix_cache import PrefixCache
from indexcache.runs.journal import ScoreJournal
from indexcache.runs.windows.windows import Windows

SEQLEN = 40


def model(num_layers=6, seed=0, **changes):
    return tiny_model(seed=seed, num_hidden_layers=num_layers, **changes)


def windows(count=8, seed=0, recall=True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 97, (count, SEQLEN + 1), generator=generator)
    marks = torch.rand(ids.shape, generator=generator) < 0.1 if recall else None
    return Windows(ids, marks, "random")


def evaluator(num_layers=6, objective="kl", count=8, cache_bytes=2**28, journal=None, **arguments):
    return Evaluator(
        "calibration",
        arguments.pop("model", None) or model(num_layers),
        arguments.pop("windows", None) or windows(count),
        objective=objective,
        cache=PrefixCache(cache_bytes),
        journal=journal,
        **arguments,
    )


def all_patterns(num_layers, full=None):
    found = ("F" + "".join(rest) for rest in product("FS", repeat=num_layers - 1))
    return [pattern for pattern in found if full is None or pattern.count("F") == full]


class TableEvaluator:
    """Costs a window from a function of the pattern; counts rounds that were asked for and not known."""

    def __init__(self, num_layers, cost, num_windows=8):
        self.reference = SharePattern.all_full(num_layers)
        self.num_layers, self.cost, self.num_windows = num_layers, cost, num_windows
        self.rounds = [range(1), range(1, 2), range(2, 4), range(4, num_windows)]
        self.journal = ScoreJournal(None, {})
        self.layer_forwards = 0
        self.processes = SimpleNamespace(count=1)
        self._first_changed = {}

    def pin(self, pattern):
        pass

    def expect(self, patterns):
        pass

    def known(self, pattern, rounds, by_loss=False):
        return 0, None

    def evaluate(self, pattern, *, stop_above=float("inf"), give_up=None, rounds=None, by_loss=False):
        costs = []
        for number, batches in enumerate(self.rounds[:rounds]):
            for window in batches:
                costs.append(float(self.cost(pattern, window)))
            if self.journal.get("calibration", pattern, number) is None:
                spent = len(batches) * (self.num_layers - pattern.find("S"))
                self.layer_forwards += spent
                self.journal.add("calibration", pattern, number, torch.zeros(len(batches), 4), spent)
            found = self._evaluation(pattern, costs)
            if found.complete or found.least_cost > stop_above or (give_up is not None and give_up(found)):
                break
        return found

    def evaluate_all(self, patterns):
        return [self.evaluate(pattern) for pattern in patterns]

    def _evaluation(self, pattern, costs):
        return Evaluation(
            pattern=pattern,
            costs=list(costs),
            weight=float(self.num_windows),
            complete=len(costs) == self.num_windows,
            scores=torch.zeros(len(costs), 4, dtype=torch.float64),
            tokens=1,
            recall_tokens=0,
            total_windows=self.num_windows,
        )
