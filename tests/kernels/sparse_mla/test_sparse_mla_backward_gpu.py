"""Sparse MLA backward on a GPU: shapes of every path against fp64, determinism, compilation, far addresses."""

import pytest
import torch

from indexcache.kernels.sparse_mla import sparse_mla_backward_triton as kernels
from indexcache.kernels.sparse_mla.sparse_mla import sparse_mla
from indexcache.kernels.sparse_mla.sparse_mla_reference import sparse_mla_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SCALE = 0.06


def problem(B, S, T, H, D, V, K, order="ascending", seed=0):
    """bf16 inputs and upstream gradients; latents that nobody selects are NaN, the first query has no keys."""
    torch.manual_seed(seed)
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
    grad_out = torch.randn(B, S, H, V, device="cuda", dtype=torch.bfloat16)
    grad_lse = torch.randn(B, S, H, device="cuda").masked_fill((indices < 0).all(-1, keepdim=True), 0.0)
    return q, kv, indices, grad_out, grad_lse


def plain_bf16(q, kv, indices, grad_out, grad_lse):
    """Gradients with bf16 products and fp32 softmax in PyTorch: the error that a kernel may have."""
    B, S, K = indices.shape
    valid = (indices >= 0).unsqueeze(2)
    rows = torch.arange(B, device="cuda").view(-1, 1, 1)
    picked = kv[rows, indices.clamp(min=0).long()].masked_fill(~valid.transpose(2, 3), 0.0)
    scores = ((q @ picked.transpose(2, 3)).float() * SCALE).masked_fill(~valid, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    V = grad_out.shape[-1]
    dp = (grad_out @ picked[..., :V].transpose(2, 3)).float()
    delta = (p * dp).sum(-1, keepdim=True) - grad_lse.unsqueeze(-1)
    ds = (p * (dp - delta) * SCALE).to(q.dtype)
    picked_grad = (ds.transpose(2, 3) @ q).float()
    picked_grad[..., :V] += (p.to(q.dtype).transpose(2, 3) @ grad_out).float()
    slots = (rows * kv.shape[1] + indices).masked_fill(indices < 0, B * kv.shape[1]).flatten()
    grad_kv = torch.zeros(B * kv.shape[1] + 1, q.shape[-1], device="cuda")
    grad_kv.index_add_(0, slots, picked_grad.flatten(0, 2))
    return ds @ picked, grad_kv[:-1].view_as(kv)


def gradients(q, kv, indices, grad_out, grad_lse, run=sparse_mla):
    inputs = q.detach().requires_grad_(), kv.detach().requires_grad_()
    out, lse = run(*inputs, indices, scale=SCALE, value_dim=grad_out.shape[-1])
    return torch.autograd.grad([out, lse], inputs, [grad_out.to(out.dtype), grad_lse.to(lse.dtype)])


def assert_right(ours, q, kv, indices, grad_out, grad_lse):
    # The reference's lse has no gradient where there are no keys: those queries get one, and no upstream gradient.
    empty = (indices < 0).all(-1)
    safe = torch.where(empty.unsqueeze(-1), indices.clamp(min=0), indices)
    upstream = [
        one.double().masked_fill(empty.view(*empty.shape, *[1] * (one.dim() - 2)), 0.0) for one in (grad_out, grad_lse)
    ]
    reference = lambda *inputs, scale, value_dim: sparse_mla_reference(*inputs, scale, value_dim)
    exact = gradients(q.double(), kv.nan_to_num().double(), safe, *upstream, run=reference)
    plain = plain_bf16(q, kv, indices, grad_out, grad_lse)
    for one, right, other in zip(ours, exact, plain):
        assert one.isfinite().all()
        assert (one - right).norm() <= 1.5 * (other - right).norm(), ((one - right).norm(), (other - right).norm())


SHAPES = [
    (1, 300, 3000, 20, 576, 512, 700),
    (1, 100, 3000, 8, 576, 512, 700),
    (2, 75, 2000, 64, 576, 512, 512),
    (2, 40, 2000, 128, 576, 512, 65),
    (2, 100, 900, 20, 80, 64, 300),
    (1, 75, 900, 48, 80, 64, 129),
]


@pytest.mark.parametrize("order", ["ascending", "scattered"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_is_as_exact_as_bf16_allows(shape, order):
    inputs = problem(*shape, order)
    assert_right(gradients(*inputs), *inputs)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_portable_kernel_is_as_exact(shape, monkeypatch):
    monkeypatch.setattr(kernels, "hopper_backward_supports", lambda *tensors: False)
    inputs = problem(*shape)
    assert_right(gradients(*inputs), *inputs)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_deterministic_runs_are_bit_identical_and_right(shape, deterministic):
    inputs = problem(*shape)
    first = gradients(*inputs)
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(first, gradients(*inputs)))
    torch.use_deterministic_algorithms(False)
    assert_right(first, *inputs)


def test_the_gradient_of_queries_is_bit_identical_anyway():
    inputs = problem(*SHAPES[0])
    first = gradients(*inputs)[0]
    assert all(torch.equal(first, gradients(*inputs)[0]) for _ in range(50))


def test_compiles_in_one_graph_forward_and_backward():
    inputs = problem(*SHAPES[0])
    compiled = torch.compile(sparse_mla, fullgraph=True, backend="aot_eager")
    assert_right(gradients(*inputs, run=compiled), *inputs)


@pytest.mark.parametrize("H", [20, 64])
def test_latents_beyond_two_to_the_31_entries_are_found(H):
    T, window = 4_000_000, 3000
    far = torch.empty(1, T, 576, device="cuda", dtype=torch.bfloat16)
    q, far[:, T - window :], indices, grad_out, grad_lse = problem(1, 50, window, H, 576, 512, 500)
    near = far[:, T - window :]
    moved = torch.where(indices < 0, -1, indices + T - window)
    grad_q, grad_kv = gradients(q, far, moved, grad_out, grad_lse)
    assert_right((grad_q, grad_kv[:, T - window :]), q, near, indices, grad_out, grad_lse)
    assert not grad_kv[:, : T - window].any()
