"""|A ∩ B| / k against sets of Python integers."""

import pytest
import torch
from testing.tiny_models import tiny_model

from indexcache.evaluation import overlap
from indexcache.evaluation.overlap import selection_overlap

IDS = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mark_bytes", [2**20, 400])
def test_it_counts_common_keys(monkeypatch, mark_bytes):
    monkeypatch.setattr(overlap, "MARK_BYTES", mark_bytes)
    model = tiny_model(num_hidden_layers=3)
    found = selection_overlap(model, IDS, queries=1000)
    with torch.inference_mode():
        chosen = model(IDS, output_topk_indices=True, use_cache=False).topk_indices
    topk = model.config.index_topk
    for i in range(3):
        for j in range(3):
            common = [
                len(set(chosen[i][b, s].tolist()) & set(chosen[j][b, s].tolist())) / topk
                for b in range(2)
                for s in range(topk, 40)
            ]
            assert float(found.matrix[i, j]) == pytest.approx(sum(common) / len(common))
    assert found.queries == 2 * (40 - topk) and found.layers == [0, 1, 2]
    assert torch.equal(found.matrix, found.matrix.T) and torch.equal(found.matrix.diagonal(), torch.ones(3).double())
    assert found.adjacent == [float(found.matrix[0, 1]), float(found.matrix[1, 2])]


def test_only_full_layers_are_compared():
    model = tiny_model(num_hidden_layers=4, index_share_pattern="FSSF")
    assert selection_overlap(model, IDS).layers == [0, 3]


def test_few_queries_are_spread_over_the_window():
    assert selection_overlap(tiny_model(num_hidden_layers=2), IDS, queries=5).queries == 10


def test_windows_within_top_k_are_refused():
    with pytest.raises(ValueError, match="windows of 12 tokens cannot tell selections apart: 12 keys"):
        selection_overlap(tiny_model(), IDS[:, :12])
