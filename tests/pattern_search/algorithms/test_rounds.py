"""Rounds of windows: growing to give patterns up early, small where all patterns are wanted on all windows."""

import torch
from testing.search_models import all_patterns, evaluator, model, windows

from indexcache.pattern_search.measure.evaluator import _rounds

LAYERS, COUNT = 6, 7


def ends(num_batches, size=None):
    return [batches.stop for batches in _rounds(num_batches, size)]


def test_every_batch_is_in_one_round():
    assert ends(16) == [1, 2, 4, 8, 16] and ends(4) == [1, 2, 4] and ends(1) == [1]
    assert ends(16, 8) == [8, 16] and ends(7, 3) == [3, 6, 7] and ends(2, 8) == [2]
    for rounds in (_rounds(13), _rounds(13, 4)):
        assert [batch for batches in rounds for batch in batches] == list(range(13))


def test_small_rounds_run_every_prefix_once_with_room_for_one_path():
    tiny, data = model(LAYERS), windows(COUNT)
    patterns = sorted(all_patterns(LAYERS, 3))
    roomy = evaluator(objective="lm", model=tiny, windows=data)
    expected = roomy.evaluate_all(patterns)
    one = evaluator(objective="lm", model=tiny, windows=data)
    one.evaluate("FFFFFS", rounds=1)
    budget = 2 * 6 * one.engine.cache.used_bytes // 5  # the state before layer 0 has no selection
    small = evaluator(objective="lm", model=tiny, windows=data, cache_bytes=budget, round_size=2)
    done = []
    found = small.evaluate_all(patterns, done.append)
    prefixes = {pattern[:length] for pattern in patterns for length in range(1, LAYERS + 1)}
    assert small.layer_forwards == COUNT * len(prefixes), "two windows at a time, each prefix once"
    assert small.engine.cache.stride == 1 and small.engine.cache.used_bytes <= budget
    assert done == [2, 4, 6, 7]
    for pattern, ours, theirs in zip(patterns, found, expected):
        assert ours.pattern == pattern and ours.complete
        assert torch.equal(ours.scores, theirs.scores)
    growing = evaluator(objective="lm", model=tiny, windows=data, cache_bytes=budget)
    growing.evaluate_all(patterns)
    assert growing.layer_forwards > small.layer_forwards, "with rounds that grow, as little room is too little"
