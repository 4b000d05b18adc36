"""Losses on windows equal the plain definition, whatever the batch and block sizes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from indexcache.evaluation import perplexity
from indexcache.evaluation.perplexity import evaluate_windows


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=48,
        first_k_dense_replace=2,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        initializer_range=0.5,
    )
    return DeepseekV32ForCausalLM(config)


def test_a_loss_beyond_fp64_s_exponent_is_an_infinite_perplexity():
    scores = perplexity.WindowScores(709.0, 709.0, None, None, 1, 0)
    assert scores.perplexity < math.inf and replace(scores, loss=710.0).perplexity == math.inf


def test_the_weight_that_stands_out_is_named(model):
    assert perplexity.largest_weight(model).startswith("its largest weight, in ")
    spoilt = copy.deepcopy(model)
    with torch.no_grad():
        spoilt.model.layers[1].mlp.up_proj.weight[0, 0] = 1e30
        name = "model.layers.1.mlp.up_proj.weight"
        assert perplexity.largest_weight(spoilt) == f"its largest weight, in {name}, is 1e+30"
        spoilt.model.norm.weight[0] = math.nan
    assert perplexity.largest_weight(spoilt) == "model.norm.weight holds values that are not finite"


def test_a_weight_in_fp8_may_be_the_one_that_stands_out():
    layer = torch.nn.Linear(4, 4, bias=False)
    layer.weight = torch.nn.Parameter(torch.full((4, 4), 448.0).to(torch.float8_e4m3fn), requires_grad=False)
    assert perplexity.largest_weight(layer) == "its largest weight, in weight, is 448"


@pytest.fixture
def windows():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (3, 30), generator=generator)
    return ids, torch.rand(ids.shape, generator=generator) < 0.3


def by_definition(model, ids, mask):
    with torch.no_grad():
        logits = model.eval()(ids[:, :-1]).logits.double()
    losses = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    hits = logits.argmax(-1) == ids[:, 1:]
    mask = mask[:, 1:]
    return [losses.mean(), losses[~mask].mean(), losses[mask].mean(), hits[mask].double().mean()]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("block_bytes", [1, 7 * 200, 2**20])
def test_scores_are_the_definition(model, windows, batch_size, block_bytes, monkeypatch):
    monkeypatch.setattr(perplexity, "LOGITS_BLOCK_BYTES", block_bytes)
    ids, mask = windows
    scores = evaluate_windows(model, ids, mask, batch_size)
    measured = [scores.loss, scores.text_loss, scores.recall_loss, scores.recall_accuracy]
    assert measured == pytest.approx([float(value) for value in by_definition(model, ids, mask)], abs=1e-5)
    assert (scores.tokens, scores.recall_tokens) == (3 * 29, int(mask[:, 1:].sum()))


def test_small_integer_types_are_read(model, windows):
    ids, mask = windows
    assert evaluate_windows(model, ids.to(torch.int16), mask.to(torch.uint8)) == evaluate_windows(model, ids, mask)


def test_without_a_mask_all_is_text(model, windows):
    scores = evaluate_windows(model, windows[0])
    assert scores.text_loss == scores.loss
    assert scores.recall_loss is None
    assert scores.recall_accuracy is None


def test_mode_of_the_model_is_left_as_it_was(model, windows):
    model.train()
    evaluate_windows(model, windows[0][:1])
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("ids", "mask", "complaint"),
    [
        (torch.zeros(3, dtype=torch.long), None, r"ids must be integers of shape \[N, L \+ 1\]"),
        (torch.zeros(2, 1, dtype=torch.long), None, "L at least 1"),
        (torch.zeros(2, 5), None, "torch.float32"),
        (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 4), r"shape of ids, \(2, 5\), got \(2, 4\)"),
        (torch.full((2, 5), 50), None, "50 .. 50, the model knows 0 .. 49: .* another tokenizer"),
    ],
)
def test_windows_that_do_not_fit_are_refused(model, ids, mask, complaint):
    with pytest.raises(ValueError, match=complaint):
        evaluate_windows(model, ids, mask)
