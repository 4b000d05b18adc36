"""One graph serves every length above top-k: compiled with dynamic shapes, or exported."""

import pytest
import torch
from testing.tiny_models import tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

LENGTHS = (40, 25, 19)


@pytest.fixture
def model():
    torch._dynamo.reset()
    return tiny_model(num_hidden_layers=2, index_share_pattern="FS", n_group=1)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 96, (2, LENGTHS[0]), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("grad", [False, True])
def test_an_exported_model_takes_every_length(model, ids, strict, grad):
    arguments = {"input_ids": ids, "use_cache": False}
    shapes = {"input_ids": {1: Dim.DYNAMIC}, "use_cache": None}
    with torch.set_grad_enabled(grad):
        exported = export(model, (), arguments, strict=strict, dynamic_shapes=shapes).module()
        for length in LENGTHS:
            got = exported(input_ids=ids[:, :length].clone(), use_cache=False).logits
            torch.testing.assert_close(got, model(ids[:, :length]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("backend", "grad"), [("sdpa", False), ("sdpa", True), ("eager", False)])
def test_a_compiled_model_is_one_graph_for_all_lengths_above_top_k(model, ids, backend, grad):
    model.set_attn_implementation(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    weight = model.model.layers[1].self_attn.kv_a_proj_with_mqa.weight

    def found(call, length):
        model.zero_grad()
        with torch.set_grad_enabled(grad):
            logits = call(ids[:, :length].clone(), use_cache=False).logits
        if not grad:
            return logits
        logits.square().mean().backward()
        return weight.grad.clone()

    # Before, since transformers notes in a global variable whether it is being compiled.
    expected = [found(model, length) for length in LENGTHS]
    graphs = []
    for length, value in zip(LENGTHS, expected):
        torch.testing.assert_close(found(compiled, length), value, atol=1e-5, rtol=1e-4)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * len(LENGTHS)
