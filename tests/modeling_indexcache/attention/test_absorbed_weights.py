"""`kv_b_proj` by head is made once whatever it is kept as, and again only when it changes."""

import copy

import pytest
import torch
from testing.tiny_models import tiny_model
from torch import nn
from transformers import DynamicCache

from indexcache.modeling_indexcache import eligibility
from indexcache.modeling_indexcache.attention import absorbed_weights
from indexcache.modeling_indexcache.attention.absorbed_weights import kept_of, multiplier
from indexcache.modeling_indexcache.cache import decode_graph

RANK = 24


class Quantised(nn.Module):
    """int8 rows with a scale each, and an adapter that can be switched off."""

    def __init__(self, linear):
        super().__init__()
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.adapter = nn.Linear(linear.in_features, linear.out_features, bias=False)
        self.adapts, self.scaling = True, {"default": 0.5}
        self.calls = 0

    def forward(self, x):
        type(self).made.append(self)
        out = nn.functional.linear(x, self.weight * self.scales)
        return out + self.scaling["default"] * self.adapter(x) if self.adapts else out


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(7)
    return torch.randint(2, 96, (1, 40))


@pytest.fixture
def model():
    model = tiny_model(index_share_pattern="FSFS")
    Quantised.made = []
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Quantised(layer.self_attn.kv_b_proj)
    return model


@torch.no_grad()
def decoded(model, ids):
    cache = DynamicCache(config=model.config)
    logits = [model(ids[:, :30], past_key_values=cache).logits]
    logits += [model(ids[:, end - 1 : end], past_key_values=cache).logits for end in range(31, 41)]
    return torch.cat(logits, dim=1)


def test_they_are_made_once_for_prefill_and_all_steps(model, ids):
    got = decoded(model, ids)
    assert len(Quantised.made) == 4
    decoded(model, ids)
    assert len(Quantised.made) == 4
    torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=1e-5)


def change_in_place(module):
    with torch.no_grad():
        module.scales.mul_(2)


def exchange_a_tensor(module):
    module.scales = module.scales * 2


def exchange_a_parts_memory(module):
    module.adapter.weight.data = module.adapter.weight.data * 2


def switch_the_adapter_off(module):
    module.adapts = False


def scale_the_adapter(module):
    module.scaling["default"] = 3.0


def exchange_the_adapter(module):
    module.adapter = nn.Linear(RANK, module.adapter.out_features, bias=False)


CHANGES = [change_in_place, exchange_a_tensor, exchange_a_parts_memory, switch_the_adapter_off, scale_the_adapter]
CHANGES += [exchange_the_adapter]


@pytest.mark.parametrize("change", CHANGES)
def test_they_are_made_again_when_something_changes(model, ids, change):
    before = decoded(model, ids)
    changed = model.model.layers[1].self_attn.kv_b_proj
    change(changed)
    Quantised.made.clear()
    after = decoded(model, ids)
    assert Quantised.made == [changed]
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_hook_that_wants_to_see_every_call_sees_it(model, ids):
    seen = []
    model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda *args: seen.append(1))
    decoded(model, ids)
    assert len(seen) == 11


def test_nothing_is_kept_while_gradients_are_wanted(model, ids):
    module = model.model.layers[3].self_attn.kv_b_proj
    model(ids).logits.sum().backward()
    assert module.adapter.weight.grad.abs().sum() > 0
    assert kept_of(module) is None


def test_a_plain_weight_is_a_view_and_nothing_is_kept(ids):
    linear = nn.Linear(RANK, 8, bias=False)
    assert multiplier(linear, RANK, linear.weight) is linear.weight
    assert kept_of(linear) is None


def test_nothing_of_weights_that_are_fetched_for_a_call_stays(model, ids):
    accelerate = pytest.importorskip("accelerate")
    expected = decoded(model, ids)
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"), offload_buffers=True)
    Quantised.made.clear()
    assert torch.equal(decoded(away, ids), expected)
    assert len(Quantised.made) == 4 * 11
    assert all(kept_of(layer.self_attn.kv_b_proj) is None for layer in away.model.layers)


def test_nothing_is_copied_or_pickled_with_a_model_or_outlives_it(model, ids):
    decoded(model, ids)
    module = model.model.layers[0].self_attn.kv_b_proj
    assert kept_of(module) is not None
    assert kept_of(copy.deepcopy(model).model.layers[0].self_attn.kv_b_proj) is None
    assert not [name for name in model.state_dict() if "absorbed" in name or "kept" in name]
    left = len(absorbed_weights._kept)
    del module, model.model.layers[0].self_attn.kv_b_proj
    Quantised.made.clear()
    assert len(absorbed_weights._kept) == left - 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_recorded_step_reads_what_is_kept_and_notices_changes(model, ids, monkeypatch, change):
    def record(run, rewind, device):
        out = run().clone()
        return out, lambda: out.copy_(run())

    monkeypatch.setattr(eligibility, "device_takes_graphs", lambda hidden_states: True)
    monkeypatch.setattr(eligibility, "why_not_expert_kernels", lambda mlp, tokens: None)
    monkeypatch.setattr(eligibility, "TRITON_ATTENTION", "sdpa")
    monkeypatch.setattr(decode_graph, "record", record)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        for end in range(31, 36):
            model(ids[:, end - 1 : end], past_key_values=cache)
        assert isinstance(vars(cache)["_indexcache_decode_graph"], decode_graph.DecodeGraph)
        assert len(Quantised.made) == 4
        change(model.model.layers[2].self_attn.kv_b_proj)
        model(ids[:, 35:36], past_key_values=cache)
    assert not isinstance(vars(cache)["_indexcache_decode_graph"], decode_graph.DecodeGraph)
