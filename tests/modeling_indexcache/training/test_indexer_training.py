"""The divergences that a training forward returns: their values against attention weights, and where gradients go."""

import pytest
import torch
from testing.tiny_models import tiny_model

from indexcache.modeling_indexcache.training.indexer_training import IndexerTraining

IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
PATTERN = "FSSF"


def model(seed=0, **changes):
    return tiny_model(seed, index_share_pattern=PATTERN, **changes).train()


def gradients(net):
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def is_indexer(name):
    return ".indexer." in name


def expected_kl(net, stage, ids=IDS, mask=None):
    """By hand from eager attention weights: each layer's head mean against its full layer's index scores."""
    net = net.eval()
    net.config._attn_implementation = "eager"
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        for layer in net.model.layers
    ]
    topk = net.config.index_topk
    if stage == "dense":
        net.config.index_topk = 10**6
        for layer in net.model.layers:
            if layer.self_attn.indexer is not None:
                layer.self_attn.indexer.index_topk = 10**6
    with torch.no_grad():
        outputs = net(ids, attention_mask=mask, use_cache=False, output_attentions=True)
    values, scores = [], None
    for layer, (args, kwargs), weights in zip(net.model.layers, seen, outputs.attentions):
        p = weights.mean(1)
        if layer.self_attn.indexer is not None:
            hidden = args[0]
            attention, indexer = layer.self_attn, layer.self_attn.indexer
            q, k, w = indexer.project(
                hidden, attention.q_a_layernorm(attention.q_a_proj(hidden)), kwargs["plan"].angles
            )
            dots = torch.einsum("bshd,btd->bhst", q, k) * indexer.head_dim**-0.5
            scores = torch.einsum("bhst,bsh->bst", dots.relu(), w)
        log_q = scores.masked_fill(p == 0, float("-inf")).log_softmax(-1)
        kl = torch.where(p > 0, p * (p.log() - log_q), torch.zeros(())).sum(-1)
        real = torch.ones(ids.shape) if mask is None else mask
        values.append((kl * real).sum() / real.sum())
    for hook in hooks:
        hook.remove()
    net.config._attn_implementation, net.config.index_topk = "sdpa", topk
    for layer in net.model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.index_topk = topk
    net.train()
    return torch.stack(values)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("padded", [False, True])
def test_divergence_is_that_of_attention_weights_from_index_scores(stage, padded):
    net = model()
    mask = None
    if padded:
        mask = torch.ones_like(IDS)
        mask[1, :9] = 0
    found = net(IDS, attention_mask=mask, indexer_training=stage).indexer_kl
    torch.testing.assert_close(found, expected_kl(net, stage, mask=mask), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_divergence_trains_the_full_layers_indexers_and_nothing_else(stage):
    net = model()
    net(IDS, indexer_training=stage).indexer_kl.sum().backward()
    found = gradients(net)
    assert {name.split(".")[2] for name in found} == {"0", "3"}
    assert all(map(is_indexer, found))
    assert len(found) == 10 and all(gradient.abs().sum() > 0 for gradient in found.values())


def test_language_model_loss_trains_everything_but_indexers():
    net = model()
    net(IDS, labels=IDS, indexer_training="sparse").loss.backward()
    found = gradients(net)
    assert not any(map(is_indexer, found))
    assert {name for name, _ in net.named_parameters() if not is_indexer(name)} == set(found)


def test_a_full_layer_learns_from_every_layer_that_it_serves():
    net = model()
    outputs = net(IDS, indexer_training="sparse")
    for served in (0, 1, 2):
        net.zero_grad()
        outputs.indexer_kl[served].backward(retain_graph=True)
        assert {name.split(".")[2] for name in gradients(net) if gradients(net)[name].abs().sum() > 0} == {"0"}


def test_without_the_cross_layer_term_served_layers_are_measured_and_teach_nothing():
    net = model()
    whole = net(IDS, indexer_training="sparse").indexer_kl
    own = net(IDS, indexer_training=IndexerTraining("sparse", cross_layer=False)).indexer_kl
    torch.testing.assert_close(own, whole)
    net.zero_grad()
    (own[1] + own[2]).backward(retain_graph=True)
    assert all(gradient.abs().sum() == 0 for gradient in gradients(net).values())
    (own[0] + own[3]).backward()
    assert {name.split(".")[2] for name in gradients(net) if gradients(net)[name].abs().sum() > 0} == {"0", "3"}


def test_gradient_checkpointing_changes_nothing():
    net = model()

    def run():
        net.zero_grad()
        outputs = net(IDS, labels=IDS, indexer_training="sparse", use_cache=False)
        (outputs.loss + outputs.indexer_kl.sum()).backward()
        return {name: gradient.clone() for name, gradient in gradients(net).items()}

    plain = run()
    net.activation_checkpointing_enable()
    checkpointed = run()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0)


def test_training_forward_reads_the_same_keys_as_inference():
    net = model()
    with torch.no_grad():
        training = net(IDS, indexer_training="sparse").logits
        torch.testing.assert_close(training, net.eval()(IDS, use_cache=False).logits, rtol=0, atol=0)


def test_recall_is_the_selected_share_of_attention_mass():
    net = model()
    topk = net.config.index_topk
    dense = net(IDS, indexer_training=IndexerTraining("dense", recall_queries=8)).attention_recall
    net.eval()
    net.config._attn_implementation = "eager"
    with torch.no_grad():
        selected = net(IDS, use_cache=False, output_topk_indices=True).topk_indices
        for layer in net.model.layers:
            if layer.self_attn.indexer is not None:
                layer.self_attn.indexer.index_topk = 10**6
        weights = net(IDS, use_cache=False, output_attentions=True).attentions
    # Layer 0 sees the same states in both runs, so that its own selection can be compared.
    share = weights[0].mean(1)[:, -8:].gather(-1, selected[0][:, -8:].long()).sum(-1)
    torch.testing.assert_close(dense[0], share.mean(), rtol=1e-4, atol=1e-6)
    assert selected[0].shape[-1] == topk and dense.shape == (4,)


def test_short_sequences_are_compared_on_all_keys():
    net = model(index_topk=64)
    found = net(IDS, indexer_training="sparse").indexer_kl
    torch.testing.assert_close(found, net(IDS, indexer_training="dense").indexer_kl, rtol=1e-4, atol=1e-6)


def test_autocast_trains_in_bf16_with_weights_in_fp32():
    net = model()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(IDS, labels=IDS, indexer_training="sparse")
    (outputs.loss + outputs.indexer_kl.sum()).backward()
    plain = net(IDS, labels=IDS, indexer_training="sparse")
    torch.testing.assert_close(outputs.loss, plain.loss, rtol=2e-2, atol=0)
    torch.testing.assert_close(outputs.indexer_kl, plain.indexer_kl, rtol=0.1, atol=1e-3)
    assert all(parameter.grad.dtype == torch.float32 for parameter in net.parameters())


def test_impossible_requests_say_why():
    net = model()
    with pytest.raises(ValueError, match=r"'dense' or 'sparse' \(got 'warm'\)"):
        net(IDS, indexer_training="warm")
    cache = net(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="drop past_key_values"):
        net(IDS, past_key_values=cache, indexer_training="dense")
    with pytest.raises(ValueError, match="index_topk=None"):
        tiny_model(index_topk=None, index_share_pattern=None)(IDS, indexer_training="dense")


@pytest.mark.parametrize("shifted", [False, True])
def test_loss_without_logits_is_the_loss_with_them(shifted, monkeypatch):
    from indexcache.modeling_indexcache.training import causal_lm_loss

    net = model()
    monkeypatch.setattr(causal_lm_loss, "LOGITS_BLOCK_BYTES", 7 * 4 * net.config.vocab_size)
    labels = IDS.clone()
    labels[0, 5:9] = -100
    given = {"labels": labels, "num_items_in_batch": 50}
    if shifted:
        given["shift_labels"] = IDS.roll(-3, 1)
    whole = net(IDS, **given)
    whole.loss.backward()
    expected = gradients(net)["lm_head.weight"].clone()
    net.zero_grad()
    blocks = net(IDS, skip_logits=True, **given)
    assert blocks.logits is None
    torch.testing.assert_close(blocks.loss, whole.loss)
    blocks.loss.backward()
    torch.testing.assert_close(gradients(net)["lm_head.weight"], expected)


def test_heads_spread_over_processes_are_refused():
    model = tiny_model(index_share_pattern="FS", num_hidden_layers=2)
    # Each of two processes sees half as many heads as the config has.
    model.config.num_attention_heads *= 2
    with pytest.raises(ValueError, match="mean over 8 heads, and tensor parallelism left 4 of them here"):
        model(torch.arange(2, 30)[None], indexer_training="sparse")
