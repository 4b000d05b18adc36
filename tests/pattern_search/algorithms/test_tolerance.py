"""The number of full layers that a tolerance chooses: fewest within it, patterns around it refined first."""

from types import SimpleNamespace

import pytest

from indexcache.pattern_search import search
from indexcache.pattern_search.search import SearchOptions, SearchOutcome
from indexcache.runs.monitor import Monitor

PATH = {5: "FFFFF", 4: "FFFFS", 3: "FFFSS", 2: "FFSSS", 1: "FSSSS"}
LOSS = {"FFFFF": 1.0, "FFFFS": 1.01, "FFFSS": 1.02, "FFSSS": 1.2, "FSSSS": 2.0}


def choose(monkeypatch, tolerance, refined, asked=(), **options):
    """The outcome where `refined` is what refinement makes of patterns; and the patterns it was asked for."""
    tried = []

    def refine(evaluator, pattern, passes, by_loss):
        tried.append(pattern)
        return SimpleNamespace(pattern=refined.get(pattern, pattern))

    monkeypatch.setattr(search, "refine", refine)
    losses = {**LOSS, "FSSFS": 1.03, "FSFFS": 1.015, "FFSFS": 1.9}
    checking = SimpleNamespace(evaluate=lambda pattern: SimpleNamespace(loss=losses[pattern]))
    outcome = SearchOutcome("FFFFF", list(asked), patterns=dict(PATH))
    search._choose(None, checking, SearchOptions(tolerance=tolerance, **options), outcome, Monitor())
    return outcome, tried


def test_the_fewest_within(monkeypatch):
    outcome, tried = choose(monkeypatch, 0.025, {})
    assert outcome.chosen == 3 and outcome.patterns == PATH
    assert tried == ["FFFSS", "FFSSS"], "the one chosen, and the next that might come within"


def test_refinement_brings_fewer_within(monkeypatch):
    outcome, tried = choose(monkeypatch, 0.035, {"FFSSS": "FSSFS"})
    assert outcome.chosen == 2 and outcome.patterns[2] == "FSSFS"
    assert tried == ["FFFSS", "FFSSS", "FSSSS"]


def test_a_refined_pattern_that_is_worse_held_out_is_not_taken(monkeypatch):
    outcome, _ = choose(monkeypatch, 0.025, {"FFFSS": "FFSFS"})
    assert outcome.chosen == 3 and outcome.patterns[3] == "FFFSS"


@pytest.mark.parametrize("options", [{"algorithm": "greedy"}, {"refine_passes": 0}])
def test_nothing_is_refined_unless_the_search_refines(monkeypatch, options):
    outcome, tried = choose(monkeypatch, 0.025, {"FFFSS": "FSFFS"}, **options)
    assert outcome.chosen == 3 and not tried


def test_what_was_asked_for_is_refined_already(monkeypatch):
    _, tried = choose(monkeypatch, 0.025, {}, asked=(3, 2))
    assert not tried


def test_nothing_within_but_the_start(monkeypatch):
    outcome, tried = choose(monkeypatch, 0.0, {})
    assert outcome.chosen == 5
