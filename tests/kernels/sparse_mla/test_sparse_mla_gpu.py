"""Sparse MLA on a GPU: shapes of every path against fp64, repeats, compilation, graphs, far addresses."""

import warnings

import pytest
import torch

from indexcache.kernels.common.dispatch import forget_failures
from indexcache.kernels.sparse_mla.sparse_mla import sparse_mla
from indexcache.kernels.sparse_mla.sparse_mla_reference import sparse_mla_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SCALE = 0.06


def problem(B, S, T, H, D, K, order="ascending"):
    """bf16 inputs; every latent that no query selects is NaN, the first query has no keys."""
    q = torch.randn(B, S, H, D, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16)
    indices = torch.rand(B, S, T, device="cuda").argsort(-1)[..., :K].int()
    if order == "ascending":
        used = torch.randint(0, K + 1, (B, S, 1), device="cuda")
        indices = torch.where(torch.arange(K, device="cuda") < used, indices.sort(-1).values, -1)
    else:
        indices[torch.rand(indices.shape, device="cuda") < 0.3] = -1
    indices[0, 0] = -1
    selected = torch.zeros(B, T + 1, dtype=torch.bool, device="cuda")
    selected.scatter_(1, torch.where(indices < 0, T, indices).flatten(1).long(), True)
    kv[~selected[:, :T]] = float("nan")
    return q, kv, indices


def plain_bf16(q, kv, indices, value_dim):
    """What PyTorch gives with bf16 products and an fp32 softmax: the error that a kernel may have."""
    rows = torch.arange(q.shape[0], device="cuda").view(-1, 1, 1)
    picked = kv[rows, indices.clamp(min=0).long()].masked_fill((indices < 0).unsqueeze(-1), 0.0)
    scores = (q @ picked.transpose(2, 3)).float() * SCALE
    weights = scores.masked_fill((indices < 0).unsqueeze(2), float("-inf")).softmax(-1).nan_to_num()
    return weights.to(q.dtype) @ picked[..., :value_dim]


def assert_right(result, q, kv, indices, value_dim):
    out, lse = result
    expected, expected_lse = sparse_mla_reference(q.double(), kv.double(), indices, SCALE, value_dim)
    plain = plain_bf16(q, kv, indices, value_dim)
    assert (out - expected).norm() <= 1.5 * (plain - expected).norm()
    empty = (indices < 0).all(-1)
    assert (out[empty] == 0).all() and (lse[empty] == float("-inf")).all()
    torch.testing.assert_close(lse[~empty].double(), expected_lse[~empty], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", ["ascending", "scattered"])
@pytest.mark.parametrize(
    ("B", "S", "T", "H", "D", "V", "K"),
    [
        (1, 300, 3000, 20, 576, 512, 700),
        (1, 300, 3000, 8, 576, 512, 700),
        (2, 150, 2000, 64, 576, 512, 512),
        (2, 75, 2000, 128, 576, 512, 65),
        (4, 1, 3000, 128, 576, 512, 2048),
        (2, 200, 900, 20, 80, 64, 300),
        (1, 150, 900, 48, 80, 64, 129),
        (2, 1, 900, 16, 40, 32, 100),
    ],
)
def test_every_path_is_as_exact_as_bf16_allows(B, S, T, H, D, V, K, order):
    q, kv, indices = problem(B, S, T, H, D, K, order)
    assert_right(sparse_mla(q, kv, indices, scale=SCALE, value_dim=V), q, kv, indices, V)


@pytest.mark.parametrize(("B", "S", "H"), [(1, 300, 20), (4, 1, 20), (1, 150, 64)])
def test_a_thousand_runs_are_bit_identical(B, S, H):
    q, kv, indices = problem(B, S, 3000, H, 576, 700)
    first = sparse_mla(q, kv, indices, scale=SCALE, value_dim=512)
    for _ in range(1000):
        again = sparse_mla(q, kv, indices, scale=SCALE, value_dim=512)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize(("B", "S"), [(1, 300), (4, 1)])
def test_compiles_in_one_graph_and_replays_on_new_inputs(B, S):
    call = lambda *inputs: sparse_mla(*inputs, scale=SCALE, value_dim=512)
    inputs = problem(B, S, 3000, 20, 576, 700)
    assert_right(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), *inputs, 512)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*inputs)
    for old, new in zip(inputs, problem(B, S, 3000, 20, 576, 700)):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert_right(result, *inputs, 512)


@pytest.mark.parametrize(("S", "H"), [(200, 20), (1, 20), (200, 64)])
def test_latents_beyond_two_to_the_31_entries_are_found(S, H):
    T, window = 4_000_000, 3000
    kv = torch.empty(1, T, 576, device="cuda", dtype=torch.bfloat16)
    q, kv[:, T - window :], indices = problem(1, S, window, H, 576, 500)
    far = torch.where(indices < 0, -1, indices + T - window)
    assert_right(sparse_mla(q, kv, far, scale=SCALE, value_dim=512), q, kv[:, T - window :], indices, 512)


def test_head_major_queries_are_read_in_place():
    q, kv, indices = problem(1, 300, 3000, 20, 576, 700)
    head_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert_right(sparse_mla(head_major, kv, indices, scale=SCALE, value_dim=512), q, kv, indices, 512)


def test_what_triton_does_not_take_runs_in_pytorch_and_says_so_once():
    q, kv, indices = problem(1, 3, 50, 4, 576, 5)
    forget_failures()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            sparse_mla(q.float(), kv.float(), indices, scale=SCALE, value_dim=512)
    assert len(caught) == 1 and "bfloat16 or float16" in str(caught[0].message)


def test_gradients_flow_through_pytorch():
    q, kv, indices = problem(1, 3, 50, 4, 576, 5)
    q.requires_grad_()
    sparse_mla(q, kv.nan_to_num(), indices, scale=SCALE, value_dim=512)[0].sum().backward()
    assert q.grad.isfinite().all()
