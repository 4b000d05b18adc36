"""The benchmark that scores every pattern of a size scores each as the search does."""

import pytest
import torch
from testing.search_models import all_patterns, evaluator, model, windows

from indexcache.benchmarks.studies.every_pattern import COLUMNS, PrefixTree, every_pattern, patterns_with, report
from indexcache.pattern_search.measure.objective import KL, LOSS, RECALL_HITS, RECALL_LOSS

PAIRS = {"loss": LOSS, "source_kl": KL, "recall_loss": RECALL_LOSS, "recall_hits": RECALL_HITS}


def test_all_patterns_are_listed():
    assert sorted(patterns_with(6, 3)) == sorted(all_patterns(6, 3))


@pytest.mark.parametrize(("batch", "fill"), [(4, False), (7, True), (100, True)])
def test_scores_are_those_of_the_search(batch, fill):
    tiny, data = model(6), windows(4)
    patterns = patterns_with(6, 3)
    tree = PrefixTree(tiny, data, batch)
    tree.fill = fill  # on CUDA every call is filled up to the same size
    found = tree.score(patterns, [0, 1, 2, 3])
    to_source = evaluator(model=tiny, windows=data)
    to_dense = evaluator(model=tiny, windows=data, teacher="dense")
    for pattern, table in zip(patterns, found):
        expected = to_source.evaluate(pattern).scores
        for name, column in PAIRS.items():
            torch.testing.assert_close(table[:, COLUMNS.index(name)], expected[:, column], rtol=1e-4, atol=1e-3)
        expected = to_dense.evaluate(pattern).scores[:, KL]
        torch.testing.assert_close(table[:, COLUMNS.index("dense_kl")], expected, rtol=1e-4, atol=1e-3)
    prefixes = {pattern[:length] for pattern in patterns for length in range(1, 7)}
    assert tree.layer_forwards == 4 * (len(prefixes) + 2 * 6), "every prefix once, and the two references"


def test_thinning_keeps_the_best():
    tiny, data = model(6, seed=1), windows(8)
    whole = every_pattern(tiny, data, windows(2, seed=5), [3], tested=3)[3]
    thinned = every_pattern(
        tiny, data, windows(2, seed=5), [3], thin=((1, 4), (4, 3)), thin_above=5, tested=3, also=["FSSSFF"]
    )[3]
    assert len(whole["calibration"][0]) == whole["all"] == 10 > len(thinned["calibration"][0])
    losses = whole["calibration"][1][:, :, 0].sum(1)
    assert whole["calibration"][0][int(losses.argmin())] in thinned["calibration"][0]
    assert "FSSSFF" in thinned["test"][0]


def test_the_report_ranks_every_pattern_by_its_loss_on_the_test_windows():
    tiny, data, test = model(6, seed=1), windows(3), windows(2, seed=5)
    found = every_pattern(tiny, data, test, [3], tested=None)[3]
    assert found["test"][0] == found["calibration"][0] and len(found["test"][0]) == 10
    rows = report(found, data, test, ["FSSSFF"])
    scored = {pattern: evaluator(model=tiny, windows=test).evaluate(pattern) for pattern in found["test"][0]}
    ranking = sorted(scored, key=lambda pattern: scored[pattern].loss)
    assert [row["pattern"] for row in rows] == ranking and [row["rank"] for row in rows] == list(range(1, 11))
    for row in rows:
        expected = scored[row["pattern"]]
        assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert row["recall"] == pytest.approx(expected.recall)
        text = (expected.loss * test.seqlen * 2 - expected.recall_loss * test.recall_tokens) / (
            test.seqlen * 2 - test.recall_tokens
        )
        assert row["text_loss"] == pytest.approx(text, rel=1e-5)
