"""What a recorded step reads, exchanged within a cache's life, is noticed; what is gone is not kept."""

import copy
import gc
import weakref

import pytest
import torch
from testing.recorded_steps import PATTERN, is_recorded, steps
from testing.tiny_models import tiny_model
from transformers import DynamicCache, StaticCache

from indexcache.modeling_indexcache import eligibility
from indexcache.modeling_indexcache.cache import decode_graph


class Doubling(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.factor = inner, 1.0

    def forward(self, x):
        return self.inner(x) * self.factor


def replace_a_weight(layer):
    layer.self_attn.o_proj.weight = torch.nn.Parameter(layer.self_attn.o_proj.weight * 2)


def replace_a_weight_and_keep_the_old(layer):
    layer.kept = [layer.self_attn.o_proj.weight]
    replace_a_weight(layer)


def replace_a_weights_memory(layer):
    layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data * 2


def assign_a_state_dict(layer):
    layer.load_state_dict({name: tensor * 1.5 for name, tensor in layer.state_dict().items()}, assign=True)


def replace_a_module(layer):
    layer.self_attn.o_proj = Doubling(layer.self_attn.o_proj)
    layer.self_attn.o_proj.factor = 2.0


def give_a_bias(layer):
    layer.self_attn.o_proj.register_parameter("bias", torch.nn.Parameter(torch.ones(48)))


def replace_a_buffer(layer):
    layer.mlp.gate.e_score_correction_bias = torch.linspace(1, -1, 8)


def hook(layer):
    layer.self_attn.o_proj.register_forward_hook(lambda module, args, out: out * 2)


def pre_hook(layer):
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: args[0] * 2)


def replace_a_forward(layer):
    forward = layer.mlp.forward
    layer.mlp.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 2


CHANGES = [replace_a_weight, replace_a_weight_and_keep_the_old, replace_a_weights_memory, assign_a_state_dict]
CHANGES += [replace_a_module, give_a_bias, replace_a_buffer, hook, pre_hook, replace_a_forward]


def replace_a_layer(model):
    model.layers[1] = copy.deepcopy(model.layers[1])


def replace_all_layers(model):
    model.layers = copy.deepcopy(model.layers)


def replace_the_norm(model):
    model.norm = copy.deepcopy(model.norm)


CHANGES_OF_MODELS = [replace_a_layer, replace_all_layers, replace_the_norm]


@pytest.mark.parametrize("change", [*CHANGES, *CHANGES_OF_MODELS])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_model_changed_within_a_caches_life_is_noticed_at_the_next_step(model, replays, ids, change, kind):
    twin = copy.deepcopy(model)
    twin.model.decode_graphs = False
    logits = []
    for decoder in (model, twin):
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            decoder(ids[:, :15], past_key_values=cache)
        made = steps(decoder, cache, ids[:, 15:22])
        assert is_recorded(cache) == (decoder is model)
        change(decoder.model if change in CHANGES_OF_MODELS else decoder.model.layers[2])
        made += steps(decoder, cache, ids[:, 22:23])
        # The stand-in for a graph runs the changed model, too: what counts is that it was not believed.
        assert not is_recorded(cache)
        logits.append(torch.cat(made + steps(decoder, cache, ids[:, 23:]), dim=1))
        assert int(cache.get_seq_length()) == 30
    assert replays
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-6)


def test_settings_of_adapters_are_noticed_and_steps_recorded_again(model, replays, ids):
    for layer in model.model.layers:
        layer.self_attn.o_proj = Doubling(layer.self_attn.o_proj)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
    steps(model, cache, ids[:, 15:20])
    assert len(replays) == 1
    model.model.layers[1].self_attn.o_proj.factor = 3.0
    got = steps(model, cache, ids[:, 20:])
    assert len(replays) == 2
    model.model.decode_graphs = False
    cache.crop(-10)
    torch.testing.assert_close(got, steps(model, cache, ids[:, 20:]), atol=1e-5, rtol=1e-5)


def test_adapters_that_are_merged_within_a_caches_life_are_noticed(model, replays, ids):
    peft = pytest.importorskip("peft")
    targets = ["q_b_proj", "o_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, model).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = adapted(ids).logits
        adapted(ids[:, :15], past_key_values=cache)
        steps(adapted, cache, ids[:, 15:20])
        assert is_recorded(cache)
        for module in adapted.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.merge()
        got = steps(adapted, cache, ids[:, 20:21])
        # A replay would have added what is merged a second time.
        assert not is_recorded(cache)
        got += steps(adapted, cache, ids[:, 21:])
    assert len(replays) == 2
    torch.testing.assert_close(torch.cat(got, dim=1), expected[:, 20:], atol=1e-4, rtol=1e-4)


def test_weights_changed_in_place_are_replayed(model, replays, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
        steps(model, cache, ids[:, 15:20])
        for parameter in model.model.layers[1].parameters():
            parameter.data.mul_(1.5)
    got = steps(model, cache, ids[:, 20:])
    assert replays == [[12]]
    model.model.decode_graphs = False
    cache.crop(-10)
    torch.testing.assert_close(got, steps(model, cache, ids[:, 20:]), atol=1e-5, rtol=1e-5)


def test_memory_that_was_given_back_is_never_replayed_over(model, replays, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
    steps(model, cache, ids[:, 15:20])
    before = replays[0][0]
    replace_a_weights_memory(model.model.layers[0])
    steps(model, cache, ids[:, 20:21])
    assert replays == [[before]]


def test_a_cache_does_not_keep_the_weights_of_a_model_that_is_gone(replays, ids, monkeypatch):
    monkeypatch.setattr(eligibility, "device_takes_graphs", lambda hidden_states: True)
    monkeypatch.setattr(eligibility, "why_not_expert_kernels", lambda mlp, tokens: None)
    monkeypatch.setattr(eligibility, "TRITON_ATTENTION", "sdpa")
    # A recording on a GPU keeps no Python objects; neither does this one.
    monkeypatch.setattr(decode_graph, "record", lambda run, rewind, device: (run().clone(), lambda: replays.append(1)))
    model = tiny_model(index_share_pattern=PATTERN)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
    steps(model, cache, ids[:, 15:20])
    assert replays
    weight = weakref.ref(model.model.layers[0].self_attn.o_proj.weight)
    del model
    gc.collect()
    assert weight() is None
    assert cache.get_seq_length() == 20


def test_modules_taken_out_of_a_model_are_free_when_no_cache_needs_their_record(model, replays, ids):
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        with torch.no_grad():
            model(ids[:, :15], past_key_values=cache)
        steps(model, cache, ids[:, 15:20])
    census = weakref.ref(vars(model.model)["_indexcache_census"])
    del cache
    caches.pop()
    gc.collect()
    assert census() is not None
    caches.pop()
    # The stand-in for a graph refers to itself.
    gc.collect()
    assert census() is None and "_indexcache_census" not in vars(model.model)


def test_a_refused_recording_is_asked_for_again_much_later(model, replays, ids, monkeypatch):
    monkeypatch.setattr(decode_graph, "STEPS_UNTIL_ASKED_AGAIN", 4)
    asked = []
    real = eligibility.why_not_recorded
    monkeypatch.setattr(decode_graph, "why_not_recorded", lambda *args: asked.append(1) or real(*args))
    handle = model.model.layers[1].register_forward_hook(lambda *args: None)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    steps(model, cache, ids[:, 5:14])
    assert len(asked) == 2
    assert replays == []
    handle.remove()
    steps(model, cache, ids[:, 14:])
    assert len(replays) == 1
