"""The number of full layers that a tolerance chooses: fewest within it, patterns around it refined first."""

from types import SimpleNamespace

import pytest

from indexcache.pattern_search import search
from indexcache.pattern_search.retrieval_guard import RetrievalGuard
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
    search._choose(None, checking, None, SearchOptions(tolerance=tolerance, **options), outcome, Monitor())
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


def guarded(monkeypatch, recalls, tolerance=0.25, least=0.9):
    asked = []

    def recall(pattern):
        asked.append(pattern)
        return recalls[pattern]

    monkeypatch.setattr(search, "refine", lambda evaluator, pattern, *_: SimpleNamespace(pattern=pattern))
    checking = SimpleNamespace(evaluate=lambda pattern: SimpleNamespace(loss=LOSS[pattern]))
    outcome = SearchOutcome("FFFFF", [], patterns=dict(PATH))
    guard = RetrievalGuard(recall, "FFFFF", least)
    search._choose(None, checking, guard, SearchOptions(tolerance=tolerance), outcome, Monitor())
    return outcome.chosen, guard, asked


def test_what_loses_retrieval_is_not_chosen_whatever_its_loss(monkeypatch):
    recalls = {"FFFFF": 0.99, "FFFFS": 0.98, "FFFSS": 0.91, "FFSSS": 0.6, "FSSSS": 0.1}
    chosen, guard, asked = guarded(monkeypatch, recalls)
    assert chosen == 3 and guard.needed == 0.9
    assert guard.refused == [{"pattern": "FFSSS", "loss": 1.2, "recall": 0.6}]
    assert sorted(asked) == ["FFFFF", "FFFSS", "FFSSS"], "once each, and only those that their loss speaks for"
    assert guarded(monkeypatch, recalls, tolerance=1.5)[0] == 3
    assert guarded(monkeypatch, dict.fromkeys(PATH.values(), 0.95), tolerance=1.5)[0] == 1


def test_a_source_that_recalls_less_is_what_patterns_are_held_to(monkeypatch):
    recalls = {"FFFFF": 0.5, "FFFFS": 0.5, "FFFSS": 0.46, "FFSSS": 0.44, "FSSSS": 0.5}
    chosen, guard, _ = guarded(monkeypatch, recalls)
    assert chosen == 3 and guard.needed == pytest.approx(0.45)
    # Too little to say anything: the loss alone decides, and the record says so.
    chosen, guard, _ = guarded(monkeypatch, {**recalls, "FFFFF": 0.2})
    assert chosen == 2 and guard.needed is None and not guard.refused
