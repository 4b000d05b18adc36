"""The local `evaluate` modules load from their folders, offline, and score what they say."""

from pathlib import Path

import pytest
import torch
from testing.tiny_models import tiny_model

from indexcache.evaluation.perplexity import evaluate_windows

evaluate = pytest.importorskip("evaluate")
METRICS = Path(__file__).parents[2] / "evaluation" / "metrics"


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=str(tmp_path))


def test_window_perplexity(load):
    model = tiny_model(num_hidden_layers=4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 97, (3, 30), generator=generator)
    marks = (torch.rand(ids.shape, generator=generator) < 0.2).int()
    arguments = {"predictions": ids.tolist(), "references": marks.tolist(), "model": model}
    found = load("window_perplexity").compute(**arguments, pattern="FSFS", batch_size=2)
    assert model.model._running_pattern.letters == "FFFF", "the model runs its own pattern again"
    own = load("window_perplexity").compute(**arguments)
    model.set_index_share_pattern("FSFS")
    expected = evaluate_windows(model, ids, marks)
    assert found["loss"] == pytest.approx(expected.loss) and found["recall"] == pytest.approx(expected.recall_accuracy)
    assert found["perplexity"] == pytest.approx(expected.perplexity) and found["tokens"] == 3 * 29
    assert own["loss"] != found["loss"]
    with pytest.raises(ValueError, match="exactly one of model_id and model"):
        load("window_perplexity").compute(**arguments, model_id="somewhere")


def test_retrieval_accuracy(load):
    answers = [
        ("jeqe.", "jeqe", True),
        (" Jeqe", "jeqe", True),
        ("jeqes", "jeqe", False),
        ("It is jeqe", "jeqe", False),
        ("12345", "1234", False),
        ("1234.", "1234", True),
        ("", "jeqe", False),
    ]
    predictions, references, hits = map(list, zip(*answers))
    lengths, depths = [1024] * 4 + [2048] * 3, [0.0, 1.0] * 3 + [0.0]
    metric = load("retrieval_accuracy")
    found = metric.compute(predictions=predictions, references=references, lengths=lengths, depths=depths)
    assert found["accuracy"] == pytest.approx(sum(hits) / 7)
    assert found["by_length"] == {1024: 0.5, 2048: pytest.approx(1 / 3)}
    assert found["by_depth"] == {0.0: 0.25, 1.0: pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="lengths must be one an answer, 1"):
        metric.compute(predictions=["a"], references=["a"], lengths=[1, 2])
