"""Algorithm 1 against the plainest way to write it, and its pipeline blocks."""

import pytest
from testing.search_models import TableEvaluator, evaluator, model, windows

from indexcache.evaluation.perplexity import evaluate_windows
from indexcache.pattern_search.algorithms.greedy import block_starts, greedy


def algorithm_1(tiny, data):
    """The paper's Algorithm 1, each candidate a whole forward of every window."""
    pattern, path = "F" * tiny.config.num_hidden_layers, []
    while pattern.count("F") > 1:
        losses = {}
        for layer in range(1, len(pattern)):
            if pattern[layer] == "F":
                candidate = pattern[:layer] + "S" + pattern[layer + 1 :]
                tiny.set_index_share_pattern(candidate)
                losses[candidate] = evaluate_windows(tiny, data.ids).loss
        pattern = min(losses, key=losses.get)
        path.append(pattern)
    return path


def test_it_is_algorithm_1():
    tiny, data = model(5, seed=3), windows(3)
    steps = greedy(evaluator(model=tiny, windows=data, objective="lm"), "FFFFF")
    assert [step.pattern for step in steps] == algorithm_1(tiny, data)
    assert all(step.cost == min(step.candidates.values()) for step in steps)
    assert [len(step.candidates) for step in steps] == [4, 3, 2, 1]


def test_prefixes_halve_the_layers_and_change_nothing():
    tiny = model(5, seed=1)
    cached = evaluator(model=tiny, objective="lm")
    plain = evaluator(model=tiny, objective="lm", cache_bytes=0)
    assert greedy(cached, "FFFFF") == greedy(plain, "FFFFF")
    assert plain.layer_forwards == 8 * 5 * 10, "N(N-1)/2 forwards of all layers over 8 windows"
    assert cached.layer_forwards < 0.7 * plain.layer_forwards


def test_ties_go_to_the_smaller_layer():
    steps = greedy(TableEvaluator(4, lambda pattern, window: pattern.count("S")), "FFFF")
    assert [step.layer for step in steps] == [1, 2, 3]


def test_pipeline_blocks_keep_their_first_layers_and_cost_less():
    counted = evaluator(8, "lm", count=2)
    steps = greedy(counted, "F" * 8, keep=2, blocks=2)
    assert steps[-1].pattern == "FSSSFSSS"
    assert all(step.pattern[4] == "F" for step in steps)
    assert [step.layer // 4 for step in steps] == [0, 1] * 3, "block after block in every round"
    whole = evaluator(8, "lm", count=2)
    greedy(whole, "F" * 8, keep=2)
    assert sum(len(step.candidates) for step in steps) == 2 * (3 + 2 + 1)
    assert counted.journal.count("calibration") < 0.6 * whole.journal.count("calibration")


@pytest.mark.parametrize(
    ("num_layers", "blocks", "starts"), [(8, 2, [0, 4]), (10, 3, [0, 3, 6]), (5, 5, [0, 1, 2, 3, 4])]
)
def test_blocks_are_even(num_layers, blocks, starts):
    assert block_starts(num_layers, blocks) == starts


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match=r"pipeline blocks must lie in 1 \.\. 4"):
        block_starts(4, 5)
    with pytest.raises(ValueError, match="2 pipeline blocks keep 2 layers full at least, and 1"):
        greedy(TableEvaluator(4, lambda pattern, window: 1), "FFFF", keep=1, blocks=2)
    with pytest.raises(ValueError, match="first layer of every pipeline block must be full"):
        greedy(TableEvaluator(4, lambda pattern, window: 1), "FFSF", keep=2, blocks=2)
