"""Few queries attend to all of a long cache, as below top-k, in the absorbed form: cheap, and as exact as expanded."""

import copy

import pytest
import torch
from testing.tiny_models import SIZES, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from indexcache.modeling_indexcache.attention import dense_attention, inference_attention, key_visibility

WIDE = dict(index_share_pattern="FS", num_hidden_layers=2, kv_lora_rank=48, v_head_dim=32, qk_nope_head_dim=32)
TOPK = 64


class Products(TorchDispatchMode):
    """Multiplications in matrix products. Not FlopCounterMode, whose hooks change which path runs."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in ("mm", "bmm"):
            self.total += args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.total += args[1].numel() * args[2].shape[-1]
        elif "scaled_dot_product" in name:
            q, k, v = args[:3]
            self.total += q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def expanded(monkeypatch):
    """Call to let every forward from now on expand latents, as all did once."""

    def switch():
        for module in (dense_attention, inference_attention):
            monkeypatch.setattr(module, "absorbed_is_cheaper", lambda *a: False)

    return switch


def products_of(model, ids, **kwargs):
    with torch.no_grad(), Products() as counted:
        model(ids, **kwargs)
    return counted.total


def step_products(model, tokens, new_cache):
    ids = torch.arange(2, 3 + tokens).remainder(90).unsqueeze(0)
    cache = new_cache(model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    return products_of(model, ids[:, -1:], past_key_values=cache)


def dynamic(config):
    return DynamicCache(config=config)


def full(config):
    """A static cache no longer than the selection."""
    return StaticCache(config=config, max_cache_len=TOPK)


@pytest.mark.parametrize("new_cache", [dynamic, full])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_step_below_top_k_costs_no_more_than_one_above(backend, new_cache):
    model = tiny_model(index_topk=TOPK, **WIDE)
    model.set_attn_implementation(backend)
    above = step_products(model, TOPK + 1, dynamic)
    assert step_products(model, TOPK - 2, new_cache) <= above


def test_a_step_costs_no_more_where_the_expanding_layer_is_wrapped():
    model = tiny_model(index_topk=4 * TOPK, **WIDE)
    plain = step_products(model, 4 * TOPK - 2, dynamic)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda *a: None)
    heads, rank, of_head = SIZES["num_attention_heads"], WIDE["kv_lora_rank"], 64
    assert step_products(model, 4 * TOPK - 2, dynamic) == plain + 2 * heads * rank * rank * of_head


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_dense_model_never_expands_a_cache_for_one_token(backend):
    model = tiny_model(**{**WIDE, "index_topk": None, "index_share_pattern": None})
    model.set_attn_implementation(backend)
    a_token_more = step_products(model, 400, dynamic) - step_products(model, 399, dynamic)
    heads, rank, rope = SIZES["num_attention_heads"], WIDE["kv_lora_rank"], SIZES["qk_rope_head_dim"]
    assert a_token_more == 2 * heads * (2 * rank + rope)


@pytest.mark.parametrize("tokens", [5, TOPK, TOPK + 30])
@pytest.mark.parametrize("new_cache", [lambda config: None, dynamic], ids=["no cache", "dynamic"])
def test_a_prefill_costs_what_it_cost(tokens, new_cache, expanded):
    model = tiny_model(index_topk=TOPK, **WIDE)
    ids = torch.arange(2, 2 + tokens).remainder(90).unsqueeze(0)
    now = products_of(model, ids, past_key_values=new_cache(model.config), use_cache=False)
    expanded()
    assert now == products_of(model, ids, past_key_values=new_cache(model.config), use_cache=False)


def masks(kind, ids):
    """One mask a forward of tokens `first` to `last`."""
    seen = torch.ones_like(ids, dtype=torch.bool)
    if kind == "none":
        return seen, lambda first, last: None
    seen[1, :9] = False
    if kind == "padding":
        return seen, lambda first, last: seen[:, :last]
    whole = (torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & seen[:, None, :]).unsqueeze(1)
    return seen, lambda first, last: whole[:, :, first:last, :last]


@torch.no_grad()
def by_steps(model, ids, mask_of, new_cache, **kwargs):
    """Logits of a prefill, of a few tokens at once and of single ones."""
    cache, parts = new_cache(model.config), []
    for first, last in ((0, 20), (20, 24), *((i, i + 1) for i in range(24, ids.shape[1]))):
        got = model(ids[:, first:last], attention_mask=mask_of(first, last), past_key_values=cache, **kwargs)
        parts.append(got.logits)
    return torch.cat(parts, dim=1)


def in_fp64(model):
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # grouped products have no fp64
    return model


@pytest.mark.parametrize("model_kind", ["sparse", "dense"])
@pytest.mark.parametrize("new_cache", [dynamic, full])
@pytest.mark.parametrize("mask_kind", ["none", "padding", "each query's own"])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "triton"])
def test_absorbed_steps_err_as_expanded_ones_do(model_kind, new_cache, mask_kind, backend, expanded, monkeypatch):
    changes = {"index_topk": TOPK, "index_share_pattern": "FSFS"}
    if model_kind == "dense":
        changes = {"index_topk": None, "q_lora_rank": None}
    model = tiny_model(**changes)
    ids = torch.randint(2, 96, (2, 40), generator=torch.Generator().manual_seed(7))
    seen, mask_of = masks(mask_kind, ids)
    # The kernels themselves need a GPU; which keys they would be told to read is the same here.
    model.config._attn_implementation_internal = backend
    monkeypatch.setattr(inference_attention, "takes_sparse_mla", lambda *a: backend == "triton")
    got = by_steps(model, ids, mask_of, new_cache)
    expanded()
    before = by_steps(model, ids, mask_of, new_cache)
    exact = by_steps(in_fp64(model), ids, mask_of, new_cache)
    assert not torch.equal(got, before)
    error, error_before = ((logits - exact)[seen].abs() for logits in (got, before))
    assert error.mean() <= 1.5 * error_before.mean()
    assert error.max() <= 3 * error_before.max()


def test_lists_of_all_keys_are_made_once_for_all_layers_and_of_few_widths(monkeypatch):
    model = tiny_model(index_topk=4 * TOPK, index_share_pattern="FSFS")
    model.config._attn_implementation_internal = "triton"
    monkeypatch.setattr(inference_attention, "takes_sparse_mla", lambda *a: True)
    made, widths = [], set()
    every, attend = key_visibility.KeyVisibility.every_index, inference_attention._attend_to_selected
    monkeypatch.setattr(
        key_visibility.KeyVisibility, "every_index", lambda self, *a: (made.append(a), every(self, *a))[1]
    )
    monkeypatch.setattr(
        inference_attention, "_attend_to_selected", lambda *a: (widths.add(a[3].indices().shape[-1]), attend(*a))[1]
    )
    ids = torch.arange(2, 92).unsqueeze(0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
        for i in range(50, 90):
            model(ids[:, i : i + 1], past_key_values=cache)
    assert len(made) == 40
    assert widths == {64, 128}


@pytest.mark.parametrize("topk", [12, TOPK], ids=["selected", "all"])
def test_eager_steps_return_the_weights_they_used(topk, expanded):
    model = tiny_model(index_share_pattern="FSFS", index_topk=topk)
    model.set_attn_implementation("eager")
    ids = torch.randint(2, 96, (2, 40), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0

    def weights_of_a_step():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :38], attention_mask=mask[:, :38], past_key_values=cache)
            out = model(ids[:, 38:], attention_mask=mask, past_key_values=cache, output_attentions=True)
        return out.attentions

    got = weights_of_a_step()
    expanded()
    for weights, before in zip(got, weights_of_a_step(), strict=True):
        assert weights.shape == (2, 4, 2, 40)
        torch.testing.assert_close(weights, before, atol=1e-6, rtol=1e-5)
    assert (got[0][1, ..., :9] == 0).all()


def test_memory_that_nobody_wrote_does_not_matter():
    """A recorded step attends to the whole buffer of a cache, of which the last rows are yet to be written."""
    model = tiny_model(index_share_pattern="FSFS", index_topk=TOPK)
    ids = torch.randint(2, 96, (2, 30), generator=torch.Generator().manual_seed(7))
    cache = StaticCache(config=model.config, max_cache_len=TOPK)
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
        model(ids[:, :29], past_key_values=cache)
        for layer in cache.layers:
            layer.keys[:, :, 29:] = float("nan")
        got = model(ids[:, 29:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_few_queries_on_a_prefix_are_those_of_expanded_heads(expanded):
    model = in_fp64(tiny_model(index_share_pattern="FSFS", index_topk=TOPK))
    ids = torch.randint(2, 96, (2, 30), generator=torch.Generator().manual_seed(7))

    def gradients():
        model.zero_grad()
        cache = DynamicCache(config=model.config)
        model(ids[:, :27], past_key_values=cache)
        model(ids[:, 27:], past_key_values=cache).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    got = gradients()
    expanded()
    for gradient, before in zip(got, gradients(), strict=True):
        torch.testing.assert_close(gradient, before)
