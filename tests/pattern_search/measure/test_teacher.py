"""KL to dense attention's predictions: what it is, and how the teacher is chosen."""

import pytest
import torch
import torch.nn.functional as F
from testing.search_models import SEQLEN, evaluator, model, windows

from indexcache.pattern_search.measure.evaluator import Evaluator
from indexcache.pattern_search.measure.layer_engine import LayerEngine
from indexcache.pattern_search.measure.objective import KL
from indexcache.pattern_search.search import SearchOptions, search
from indexcache.runs.journal import ScoreJournal


def dense_model(tiny):
    """The same weights, every key selected."""
    config = type(tiny.config).from_dict({**tiny.config.to_dict(), "index_topk": SEQLEN})
    dense = type(tiny)(config).eval()
    dense.load_state_dict(tiny.state_dict())
    return dense


def test_dense_attention_is_selection_of_every_key():
    tiny, data = model(4), windows(3)
    scored = evaluator(model=tiny, windows=data, batch_size=3)
    with torch.inference_mode():
        expected = dense_model(tiny).model(data.ids[:, :-1], use_cache=False).last_hidden_state
        plain = tiny.model(data.ids[:, :-1], use_cache=False).last_hidden_state
    found = scored.engine.dense_hidden(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert scored.engine.layer_forwards == 4 * 3


def test_kl_is_measured_to_dense_predictions():
    tiny, data = model(4), windows(3)
    found = evaluator(model=tiny, windows=data, teacher="dense").evaluate("FSFS")
    tiny.set_index_share_pattern("FSFS")
    with torch.inference_mode():
        wanted = dense_model(tiny)(data.ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)
        given = tiny(data.ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)
    kl = F.kl_div(given, wanted, log_target=True, reduction="none").sum((1, 2))
    torch.testing.assert_close(found.scores[:, KL], kl, rtol=1e-4, atol=1e-4)
    assert evaluator(model=tiny, windows=data, teacher="dense").evaluate("FFFF").cost > 0


def losses(tiny, data, count):
    dense = dense_model(tiny)
    ids = data.ids[:count]
    with torch.inference_mode():
        return [
            float(F.cross_entropy(m(ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten()))
            for m in (dense, tiny)
        ]


@pytest.mark.parametrize("seed", range(4))
def test_the_better_predictor_teaches(seed):
    tiny, data = model(4, seed=seed), windows(16, seed=seed)
    scored = evaluator(model=tiny, windows=data, teacher="auto")
    dense, source = losses(tiny, data, count=1)
    assert scored.teacher == ("dense" if dense < source else "source")
    forwards = scored.layer_forwards
    assert forwards == 2 * 4, "one window, densely and as the source has it"
    assert scored.teacher and scored.layer_forwards == forwards


def test_both_outcomes_happen():
    assert {evaluator(model=model(4, seed=seed), count=16, teacher="auto").teacher for seed in range(8)} == {
        "dense",
        "source",
    }


def test_windows_no_longer_than_topk_have_one_teacher():
    tiny = model(3, index_topk=SEQLEN)
    assert evaluator(model=tiny, teacher="dense").teacher == "source"


def test_loss_needs_no_teacher():
    scored = evaluator(4, "lm", teacher="auto")
    scored.evaluate("FSFS")
    assert scored.teacher == "source" and scored.journal.layer_forwards("calibration teacher") == 0


def test_the_choice_is_journaled(tmp_path, monkeypatch):
    tiny = model(4)
    journal = ScoreJournal(tmp_path / "journal.jsonl", {})
    first = evaluator(model=tiny, teacher="auto", journal=journal)
    first.evaluate("FSFS")
    journal.close()
    monkeypatch.setattr(LayerEngine, "dense_hidden", lambda *_: pytest.fail("dense attention was run again"))
    again = evaluator(model=tiny, teacher="auto", journal=ScoreJournal(tmp_path / "journal.jsonl", {}, resume=True))
    again.evaluate("FSFS")
    assert again.teacher == first.teacher and again.layer_forwards == first.layer_forwards


def test_a_search_says_who_taught():
    outcomes = {
        options: search(model(4), windows(4), windows(2, seed=9), SearchOptions(keep=("1/2",), **dict([options])))
        for options in (("teacher", "dense"), ("teacher", "source"), ("objective", "lm"))
    }
    assert [outcome.teacher for outcome in outcomes.values()] == ["dense", "source", None]


def test_unknown_teachers_are_refused():
    with pytest.raises(ValueError, match="teacher must be one of auto, dense, source"):
        Evaluator("calibration", model(3), windows(2), teacher="best")
