"""Gradients: the same from every backend, with and without checkpointing, none for the indexers."""

import torch
from testing.tiny_models import tiny_model


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-9, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_backends_and_checkpointing_agree_in_fp64():
    torch.manual_seed(6)
    ids = torch.randint(2, 96, (2, 37))
    model = tiny_model(index_share_pattern="FSSF").double().train()
    model.set_experts_implementation("eager")  # the grouped matmul has no fp64
    sdpa = gradients(model, ids)
    model.set_attn_implementation("eager")
    eager = gradients(model, ids)
    model.set_attn_implementation("sdpa")
    model.activation_checkpointing_enable()
    checkpointed = gradients(model, ids)
    assert_same(eager, sdpa)
    assert_same(checkpointed, sdpa)
    expected = {name for name, p in model.named_parameters() if ".indexer." not in name}
    assert sdpa.keys() == expected


def test_attention_dropout_takes_effect_in_training_only():
    torch.manual_seed(7)
    ids = torch.randint(2, 96, (1, 30))
    model = tiny_model(attention_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
