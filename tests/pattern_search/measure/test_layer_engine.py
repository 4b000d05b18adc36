"""The engine computes what the model computes, from any cached prefix, and counts what it runs."""

import pytest
import torch
from testing.search_models import all_patterns, model, windows

from indexcache.pattern_search.measure.layer_engine import LayerEngine
from indexcache.pattern_search.measure.prefix_cache import LayerState, PrefixCache


def engine(tiny, budget, count=4, batch_size=2):
    ids = windows(count).ids[:, :-1]
    return LayerEngine(tiny, list(ids.split(batch_size)), PrefixCache(budget))


@pytest.mark.parametrize("budget", [0, 60_000, 2**28])
def test_every_pattern_gives_the_model_s_hidden_states(budget):
    tiny = model(4)
    runner = engine(tiny, budget)
    for pattern in all_patterns(4):
        tiny.set_index_share_pattern(pattern)
        for batch, ids in enumerate(runner.batches):
            with torch.inference_mode():
                expected = tiny.model(input_ids=ids, use_cache=False).last_hidden_state
            assert torch.equal(runner.last_hidden(pattern, batch), expected), pattern
    assert runner.cache.used_bytes <= budget


def test_a_candidate_runs_only_the_layers_from_its_change_on():
    runner = engine(model(6), 2**28)
    runner.last_hidden("FFFFFF", 0)
    assert runner.layer_forwards == 6 * 2
    runner.last_hidden("FFFFSF", 0)
    assert runner.layer_forwards == (6 + 2) * 2
    runner.last_hidden("FFFFSS", 0)
    assert runner.layer_forwards == (6 + 2 + 1) * 2
    runner.last_hidden("FFFFSF", 1)
    assert runner.layer_forwards == (6 + 2 + 1 + 6) * 2, "another batch has its own states"


def test_without_memory_everything_runs_again():
    runner = engine(model(6), 0)
    for _ in range(3):
        runner.last_hidden("FFFFSF", 0)
    assert runner.layer_forwards == 3 * 6 * 2


def test_a_small_budget_keeps_every_nth_layer():
    tiny = model(6)
    whole = engine(tiny, 2**28)
    whole.last_hidden("FFFFFF", 0)
    path = whole.cache.used_bytes * 2  # both batches
    runner = engine(tiny, path // 3)
    runner.cache.pin("FFFFFF")
    for batch in (0, 1):
        runner.last_hidden("FFFFFF", batch)
    assert runner.cache.stride > 1
    before = runner.layer_forwards
    runner.last_hidden("FFFFFS", 0)
    assert 0 < runner.layer_forwards - before < 6 * 2, "it starts at the nearest layer kept"
    assert runner.cache.used_bytes <= path // 3


def test_the_pinned_path_is_the_last_to_go():
    state = lambda: LayerState(torch.zeros(25), None)  # 100 bytes
    cache = PrefixCache(300)
    cache.pin("FFF")
    for prefix in ("", "F", "FS", "FF"):
        cache.keep(0, prefix, state())
    assert cache.longest(0, "FSF")[0] == 1, "the state under FS gave way"
    assert cache.longest(0, "FFF")[0] == 2


def test_a_selection_shared_by_layers_is_counted_once():
    selection = torch.zeros(10, dtype=torch.int32)
    cache = PrefixCache(1000)
    for prefix in ("F", "FS", "FSS"):
        cache.keep(0, prefix, LayerState(torch.zeros(5), selection))
    assert cache.used_bytes == 3 * 20 + 40
    cache.budget_bytes = 60
    cache.keep(0, "FSSS", LayerState(torch.zeros(5), None))
    assert cache.used_bytes <= 60


def test_dense_windows_run_without_a_selection():
    tiny = model(3, index_topk=64)
    runner = engine(tiny, 2**28)
    assert torch.equal(runner.last_hidden("FSS", 0), runner.last_hidden("FFF", 0)), "all is selected in every layer"
