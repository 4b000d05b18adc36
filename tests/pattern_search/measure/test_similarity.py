"""The similarity baseline against brute force."""

import pytest
import torch
from testing.search_models import all_patterns, evaluator, model

from indexcache import SharePattern
from indexcache.pattern_search.measure.similarity import output_similarity, similarity_patterns


def value(pattern, similarity):
    known = SharePattern(pattern)
    return sum(float(similarity[layer, known.source_of(layer)]) for layer in known.shared_layers)


@pytest.mark.parametrize("seed", range(3))
def test_dynamic_programming_finds_the_best_of_all_patterns(seed):
    similarity = torch.rand(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tril()
    found = similarity_patterns(similarity, "F" * 7)
    assert sorted(found) == list(range(1, 8))
    for count, pattern in found.items():
        best = max(value(other, similarity) for other in all_patterns(7, count))
        assert pattern.count("F") == count and value(pattern, similarity) == pytest.approx(best)


def test_layers_without_an_indexer_stay_shared():
    similarity = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril()
    found = similarity_patterns(similarity, "FSFSF")
    assert sorted(found) == [1, 2, 3] and found[3] == "FSFSF"


def attention_outputs(tiny, pattern, data):
    kept = []
    tiny.set_index_share_pattern(pattern)
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output: kept.append(output[0]))
        for layer in tiny.model.layers
    ]
    with torch.inference_mode():
        tiny(data.ids[:, :-1], use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


def test_similarity_is_the_cosine_of_attention_outputs():
    tiny = model(3)
    scored = evaluator(model=tiny, count=2)
    similarity = output_similarity(scored)
    outputs = {pattern: attention_outputs(tiny, pattern, scored.windows) for pattern in ("FFF", "FFS", "FSF")}
    # Only the shared layer's own output differs in kind: its input is the all-full model's in both.
    for row, source, pattern in ((2, 1, "FFS"), (1, 0, "FSF")):
        expected = torch.cosine_similarity(outputs["FFF"][row], outputs[pattern][row], dim=-1).mean()
        assert float(similarity[row, source]) == pytest.approx(float(expected), abs=1e-5)
    assert torch.equal(similarity.diagonal(), torch.ones(3, dtype=torch.float64))


def test_it_is_journaled_and_counted():
    scored = evaluator(4, count=2)
    first = output_similarity(scored)
    forwards = scored.journal.layer_forwards("similarity")
    assert forwards == 2 * (4 + 4 * 3 // 2)
    assert torch.equal(output_similarity(scored), first)
    assert scored.journal.layer_forwards("similarity") == forwards
