"""Which path runs can be asked for, and is said where it is not the one to be expected."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from testing.tiny_models import tiny_model
from torch import nn
from transformers import DynamicCache

from indexcache.modeling_indexcache import eligibility
from indexcache.modeling_indexcache.explain_paths import Path, explain_paths


@pytest.fixture
def model():
    return tiny_model(index_share_pattern="FSFS")


@pytest.fixture
def on_cuda(monkeypatch):
    """As if the tiny model ran in kernels on a GPU."""
    monkeypatch.setattr(eligibility, "device_takes_graphs", lambda hidden_states: True)
    monkeypatch.setattr(eligibility, "unsupported_experts_reason", lambda *tensors: None)
    monkeypatch.setattr(eligibility, "TRITON_ATTENTION", "sdpa")


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def ids():
    return torch.arange(2, 42)[None]


def test_a_model_as_it_is_streams_in_place(model):
    paths = model.explain_paths()
    assert paths == model.model.explain_paths() == explain_paths(model.model)
    assert paths.prefill.runs == "streamed, in place"
    assert paths.decode.runs == "streamed"
    (reason,) = paths.prefill.why_not_faster
    assert reason.startswith("attn_implementation is 'sdpa', the model on cpu")
    assert paths.recorded.runs == "not recorded"
    assert "CUDA graphs need a CUDA device" in paths.recorded.why_not_faster[0]


def test_it_is_recorded_where_it_can_be(model, on_cuda):
    assert model.explain_paths().recorded == Path("one graph")
    model.model.decode_graphs = False
    assert model.explain_paths().recorded == Path("not recorded", ("decode_graphs is off",))


def test_eager_attention_runs_module_by_module(model):
    model.set_attn_implementation("eager")
    paths = model.explain_paths()
    assert paths.prefill.runs == paths.decode.runs == "module by module"
    assert 'layers 0-3: self_attn: attn_implementation is "eager"' in paths.prefill.why_not_faster


@pytest.mark.parametrize(
    ("path", "runs", "reason"),
    [
        ("layers.1", "module by module", "layer 1: replaced by Wrapper"),
        ("layers.2.self_attn", "module by module", "layer 2: self_attn: replaced by Wrapper"),
        ("layers.2.input_layernorm", "streamed", "layer 2: input_layernorm: replaced by Wrapper"),
        ("layers.3.mlp.gate", "streamed, in place", "layer 3: mlp.gate: replaced by Wrapper"),
        (
            "layers.0.self_attn.indexer",
            "streamed, in place",
            "layer 0: self_attn.indexer: replaced by Wrapper",
        ),
        ("layers.0.self_attn.o_proj", "streamed, in place", "layer 0: self_attn.o_proj: replaced by Wrapper"),
        (
            "layers.1.self_attn.kv_a_layernorm",
            "streamed, in place",
            "layer 1: self_attn.kv_a_layernorm: replaced by Wrapper",
        ),
    ],
)
def test_what_stands_in_another_modules_place_is_named(model, path, runs, reason):
    model.model.set_submodule(path, Wrapper(model.model.get_submodule(path)))
    paths = model.explain_paths()
    assert paths.prefill.runs == runs
    assert reason in paths.prefill.why_not_faster
    assert reason in str(paths)


def test_hooks_and_forwards_are_named_layer_by_layer(model, on_cuda):
    for index in (0, 1, 3):
        model.model.layers[index].self_attn.register_forward_hook(lambda *args: None)
    mlp = model.model.layers[2].mlp
    mlp.forward = mlp.forward
    paths = model.explain_paths()
    assert "layers 0-1, 3: self_attn: a hook watches it" in paths.prefill.why_not_faster
    assert "layer 2: mlp: its forward was replaced" in paths.prefill.why_not_faster
    assert paths.recorded == Path("not recorded", ("layers.0.self_attn: a hook watches it",))


def test_placement_is_told(model, on_cuda, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    hooks = pytest.importorskip("accelerate.hooks")
    placed = copy.deepcopy(model)
    for layer in placed.model.layers:
        for module in layer.modules():
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
    paths = placed.explain_paths()
    assert paths.prefill.runs == "streamed, in place"
    assert paths.recorded.runs == "one graph"
    for module in placed.model.layers[3].modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("meta"))
    assert placed.explain_paths().recorded.runs == "2 graphs, one for each range of layers on a device"
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    paths = away.explain_paths()
    assert paths.prefill.runs == "streamed, in place"
    assert "layers 0-3: self_attn.q_a_proj: accelerate keeps its weights elsewhere between calls" in (
        paths.prefill.why_not_faster
    )
    assert "accelerate keeps its weights elsewhere" in paths.recorded.why_not_faster[0]


def test_asking_changes_nothing(model):
    before = model(ids()).logits
    model.explain_paths()
    assert torch.is_grad_enabled()
    assert torch.equal(model(ids()).logits, before)


def said(caplog):
    return [record.message for record in caplog.records if record.message.startswith("IndexCache: ")]


def test_a_slower_path_on_a_gpu_is_said_once_with_its_reason(model, monkeypatch, caplog):
    monkeypatch.setattr(eligibility, "TRITON_ATTENTION", "sdpa")
    eligibility.logger.warning_once.cache_clear()
    somewhere = SimpleNamespace(is_cuda=True)
    with caplog.at_level(logging.WARNING):
        for hidden_states in (SimpleNamespace(is_cuda=False), somewhere, somewhere):
            with torch.no_grad():
                eligibility.say_slower(model.model, hidden_states, "steps are slow", "it rains")
        eligibility.say_slower(model.model, somewhere, "steps are slow", "gradients are wanted")
    assert said(caplog) == ["IndexCache: steps are slow: it rains. model.explain_paths() says what runs"]


def test_prefill_and_decoding_say_what_keeps_them_slow(model, on_cuda, monkeypatch):
    heard = []
    monkeypatch.setattr(eligibility, "say_slower", lambda *args: heard.append(args[2:]))
    with torch.no_grad():
        model(ids())
    assert heard == []
    model.model.layers[1] = Wrapper(model.model.layers[1])
    model.generate(ids(), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert ("prefill keeps every layer's input", "layers.1: replaced by Wrapper") in heard
    assert ("decoding steps are not recorded", "layers.1: replaced by a module of another class") in heard


def test_attention_and_experts_say_what_keeps_them_slow(model, on_cuda, monkeypatch):
    heard = []
    monkeypatch.setattr(eligibility, "say_slower", lambda *args: heard.append(args[2:]))
    monkeypatch.setattr(model.model.layers[1].mlp.config, "hidden_act", "gelu")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids())
    assert ("attention makes queries and outputs of all tokens at once", "autocast is on") in heard
    assert ("experts run in PyTorch", "hidden_act is 'gelu'") in heard


def test_a_wrapped_embedding_does_not_stop_a_static_cache(model):
    model.model.embed_tokens = Wrapper(model.model.embed_tokens)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(), past_key_values=cache)
    assert eligibility.why_no_graphs(model.model) is not None
