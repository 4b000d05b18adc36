"""The benchmark times and repeats the search that users run."""

from testing.search_models import evaluator, model, windows

from indexcache.benchmarks.studies.pattern_search import PATH_ROUNDS, searched
from indexcache.pattern_search.search import SearchOptions, search


def test_it_is_the_default_search():
    tiny, data = model(8, seed=2), windows(16)
    options = SearchOptions(keep=("4", "2"))
    found = search(tiny, data, windows(2, seed=9), options)
    measured = searched(evaluator(model=tiny, windows=data, teacher="auto"), {4, 2})
    assert [evaluation.pattern for evaluation in measured] == [found.patterns[4], found.patterns[2]]
    assert options.path_rounds == PATH_ROUNDS
    assert all(evaluation.complete for evaluation in measured)
