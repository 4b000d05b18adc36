"""Gradients: the same from every backend, with and without checkpointing, none for the indexers."""

import pytest
import torch
from testing.tiny_models import tiny_model
from transformers import DynamicCache

from indexcache.modeling_indexcache.forward_plan import ForwardPlan


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_give_the_very_gradients(reentrant):
    ids = torch.randint(2, 96, (2, 37), generator=torch.Generator().manual_seed(6))
    model = tiny_model(index_share_pattern="FSSF").train()
    model.enable_input_require_grads()
    plain = gradients(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients(model, ids)
    assert checkpointed.keys() == plain.keys()
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def test_checkpointed_layers_leave_a_cache_alone():
    ids = torch.arange(2, 32)[None]
    model = tiny_model(index_share_pattern="FSSF").train()
    expected = gradients(model, ids)
    model.activation_checkpointing_enable()
    cache = DynamicCache(config=model.config)
    model.zero_grad()
    model(ids, labels=ids, past_key_values=cache).loss.backward()
    assert cache.get_seq_length() == 0
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-4)


def test_a_layer_run_with_gradient_by_a_plan_made_without_has_one():
    """As quantisers do it that catch a layer's inputs and train the layer with them."""
    model = tiny_model(index_share_pattern="FSSF")
    ids = torch.arange(2, 32)[None]
    with torch.no_grad():
        hidden = model.get_input_embeddings()(ids)
        plan = ForwardPlan.of(model.model, hidden)
        selection = plan.run(model.model, hidden, last=2)[1]
    assert plan.mode == "streamed" and plan.in_place and plan.streams_attention
    given = hidden.clone().requires_grad_()
    layer = model.model.layers[2]
    layer(given * 1, selection=selection, plan=plan)[0].square().sum().backward()
    assert given.grad.abs().sum() > 0 and layer.self_attn.q_b_proj.weight.grad.abs().sum() > 0
