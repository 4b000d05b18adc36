"""Inference on a GPU: fused passes and decoding graphs against PyTorch, step by step."""

import copy

import pytest
import torch
from testing.tiny_models import GATES, tiny_model
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig

from indexcache.kernels.common import early_launch
from indexcache.kernels.sparse_mla import merged_selection
from indexcache.kernels.sparse_mla.merged_selection import MergedSelection
from indexcache.modeling_indexcache import eligibility
from indexcache.modeling_indexcache.attention import inference_attention
from indexcache.modeling_indexcache.cache.decode_graph import DecodeGraph
from indexcache.modeling_indexcache.layers import indexer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PATTERN = "FSFS"


@pytest.fixture(scope="module", params=[{"n_group": 1}, {"n_group": 2}, {"n_group": 1, **GATES}])
def model(request):
    model = tiny_model(index_share_pattern=PATTERN, index_n_heads=16, **request.param).to("cuda", torch.bfloat16)
    model.set_attn_implementation("triton")
    return model


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(3)
    return torch.randint(2, 96, (2, 40), device="cuda")


@torch.no_grad()
def decoded(model, ids, cache, first, graphs):
    model.model.decode_graphs = graphs
    model(ids[:, :first], past_key_values=cache)
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(first, ids.shape[1])]
    model.model.decode_graphs = True
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("first", [4, 24])
def test_graphs_equal_steps_from_python(model, ids, kind, batch, first):
    """A dynamic cache's first steps attend to everything, a graph's to a selection of everything: another rounding."""

    def new_cache():
        return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=48)

    cache = new_cache()
    got = decoded(model, ids[:batch], cache, first, True)
    assert isinstance(vars(cache)["_indexcache_decode_graph"], DecodeGraph)
    expected = decoded(model, ids[:batch], new_cache(), first, False)
    if first > model.config.index_topk or kind == "static":
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
        return
    exact = copy.deepcopy(model).float()(ids[:batch]).logits[:, first:]
    assert (got - exact).pow(2).mean() <= 2.25 * (expected - exact).pow(2).mean()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_graphs_equal_steps_from_python_with_an_e4m3_indexer(model, ids, kind, monkeypatch):
    monkeypatch.setattr(model.config, "indexer_fp8", True)
    test_graphs_equal_steps_from_python(model, ids, kind, 2, 24)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="launches early from Hopper on"
)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_kernels_launched_early_give_the_same_bits(model, ids, kind, monkeypatch):
    def new_cache():
        return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=48)

    assert early_launch._can_launch_early(model.device)
    got = decoded(model, ids[:1], new_cache(), 24, True)
    monkeypatch.setattr(early_launch, "_can_launch_early", lambda device: False)
    assert torch.equal(got, decoded(model, ids[:1], new_cache(), 24, True))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_weights_of_one_token_are_those_of_many(model, dtype):
    made = model.model.layers[0].self_attn.indexer
    bf16 = made.weights_proj.weight.data
    made.weights_proj.to(dtype)
    x = torch.randn(1, 5, 48, device="cuda", dtype=torch.bfloat16)
    expected = made.head_weights(x)[:, :1]
    got = made.head_weights(x[:, :1])
    made.weights_proj.weight.data = bf16
    assert got.dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # bf16 rounds the last bit one way or the other
    assert (got - expected).norm() <= tolerance * expected.norm()


def test_fused_passes_err_as_pytorch_does(model, ids):
    with torch.no_grad():
        fused = model(ids).logits
        model.set_attn_implementation("sdpa")
        plain = model(ids).logits
        exact = model.float()(ids).logits
    model.to(torch.bfloat16).set_attn_implementation("triton")

    def error(logits):
        return (logits - exact).pow(2).mean().sqrt()

    assert error(fused) <= 1.5 * error(plain)


@torch.no_grad()
def assert_greedy_but_for_rounding(model, tokens, prompt):
    """Each token is the best one by fp32 logits, or within what bf16 arithmetic errs by on the same tokens."""
    exact = copy.deepcopy(model).float()(tokens).logits[:, prompt - 1 : -1]
    error = (model(tokens).logits[:, prompt - 1 : -1] - exact).abs().max()
    chosen = exact.gather(-1, tokens[:, prompt:, None]).squeeze(-1)
    # Both the token taken and the one passed over may be off by that much.
    assert (exact.max(-1).values - chosen).max() <= 3 * error


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_generate_gives_the_same_tokens_with_and_without_graphs(model, ids, options):
    """Without graphs a static cache would be compiled, whose rounding is another."""
    options = options | {"disable_compile": True}

    def greedy():
        return model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=1, **options)

    got = greedy()
    model.model.decode_graphs = False
    expected = greedy()
    model.model.decode_graphs = True
    for tokens in (got, expected):
        assert_greedy_but_for_rounding(model, tokens, ids.shape[1])
    assert (got == expected).float().mean() > 0.9


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_decoding_step_compiles_in_one_graph(model, ids, backend):
    torch.compiler.reset()

    def steps(call):
        cache = StaticCache(model.config, max_cache_len=48)
        model(ids[:1, :24], past_key_values=cache)
        return torch.cat([call(ids[:1, i : i + 1], past_key_values=cache).logits for i in range(24, 30)], dim=1)

    model.model.decode_graphs = False
    expected = steps(model.forward)
    got = steps(torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend))
    model.model.decode_graphs = True
    exact = copy.deepcopy(model).float()(ids[:1, :30]).logits[:, 24:]
    assert (got - exact).pow(2).mean() <= 2.25 * (expected - exact).pow(2).mean()


def test_generate_compiles_where_it_is_asked_to(model, ids):
    torch.compiler.reset()
    options = dict(
        max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=1, cache_implementation="static"
    )
    compiled = CompileConfig(fullgraph=True, dynamic=False, mode="default")
    got = model.generate(ids[:1], compile_config=compiled, **options)
    assert got.shape[1] == ids.shape[1] + 16
    assert_greedy_but_for_rounding(model, got, ids.shape[1])


@torch.no_grad()
def test_a_long_prefill_attends_by_merged_lists_as_by_single_ones(model, monkeypatch):
    monkeypatch.setattr(merged_selection, "LEAST_QUERIES", 64)
    monkeypatch.setattr(indexer, "QUERY_BLOCK_BYTES", 2**17)
    ids = torch.randint(2, 96, (2, 250), generator=torch.Generator().manual_seed(5)).cuda()
    merged = []
    fill = MergedSelection.fill
    monkeypatch.setattr(MergedSelection, "fill", lambda self, *a: (merged.append(a[0]), fill(self, *a))[1])
    got = model(ids).logits
    assert merged
    monkeypatch.setattr(inference_attention, "merging_group", lambda *_: 1)
    expected = model(ids).logits
    assert torch.equal(got, expected)


@torch.no_grad()
def test_fp32_head_weights_of_many_bf16_tokens_are_exact_in_fp32(model):
    made = model.model.layers[0].self_attn.indexer
    x = torch.randn(1, eligibility.LEAST_PARTED_TOKENS, 48, device="cuda", dtype=torch.bfloat16)
    bf16 = made.weights_proj.weight.data
    made.weights_proj.to(torch.float32).weight.data.normal_()
    got = made.head_weights(x)
    exact = torch.nn.functional.linear(x.double(), made.weights_proj.weight.double()) * made.n_heads**-0.5
    made.weights_proj.weight.data = bf16
    assert got.dtype == torch.float32
    assert (got - exact).norm() <= 1e-6 * exact.norm()
