"""KL and loss of a window against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from testing.search_models import evaluator, model, windows

from indexcache.evaluation.perplexity import evaluate_windows
from indexcache.pattern_search.measure import objective
from indexcache.pattern_search.measure.objective import KL, LOSS


@pytest.mark.parametrize("reference_bytes", [0, 2**28])
def test_kl_and_loss_are_those_of_the_logits(monkeypatch, reference_bytes):
    monkeypatch.setattr(objective, "LOGITS_BLOCK_BYTES", 97 * 4 * 7)  # seven rows a block
    tiny = model(4)
    scored = evaluator(model=tiny, windows=windows(3), batch_size=2, reference_bytes=reference_bytes)
    found = scored.evaluate("FSFS")
    ids = scored.windows.ids
    logits = {}
    for pattern in ("FFFF", "FSFS"):
        tiny.set_index_share_pattern(pattern)
        with torch.inference_mode():
            logits[pattern] = tiny(ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)
    kl = F.kl_div(logits["FSFS"], logits["FFFF"], log_target=True, reduction="none").sum((1, 2))
    loss = -logits["FSFS"].gather(-1, ids[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(found.scores[:, KL], kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.scores[:, LOSS], loss, rtol=1e-5, atol=1e-4)
    assert found.kl == pytest.approx(float(kl.sum()) / ids[:, 1:].numel(), rel=1e-4)


def test_the_reference_itself_costs_nothing():
    assert evaluator(4).evaluate("FFFF").cost == pytest.approx(0, abs=1e-6)


def test_loss_and_recall_agree_with_evaluate_windows():
    tiny = model(4)
    scored = evaluator(model=tiny, objective="lm", count=5, batch_size=2)
    found = scored.evaluate("FFSS")
    tiny.set_index_share_pattern("FFSS")
    expected = evaluate_windows(tiny, scored.windows.ids, scored.windows.recall)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.recall_loss == pytest.approx(expected.recall_loss, rel=1e-5)
    assert found.recall == pytest.approx(expected.recall_accuracy)


def test_far_context_weighs_the_tokens_that_need_it():
    plain, weighted = evaluator(4), evaluator(4, "far-kl")
    plain.evaluate("FSSS"), weighted.evaluate("FSSS")
    weights = weighted.scorer.weights[0]
    torch.testing.assert_close(weights.mean(-1), torch.ones(len(weights)))
    assert (weights > 0).all() and weights.std() > 0
    assert weighted.evaluate("FSSS").cost != plain.evaluate("FSSS").cost
    assert weighted.evaluate("FSSS").loss == pytest.approx(plain.evaluate("FSSS").loss), "the loss stays unweighted"


def test_costs_of_windows_are_lower_bounds():
    scored = evaluator(5)
    for pattern in ("FSSSS", "FFSSS", "FSFSF"):
        whole = scored.evaluate(pattern)
        bounds = [scored.evaluate(pattern, rounds=rounds).least_cost for rounds in range(1, len(scored.rounds) + 1)]
        assert bounds == sorted(bounds)
        assert bounds[-1] == pytest.approx(whole.cost)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective must be one of kl, far-kl, lm"):
        evaluator(4, "loss")
