"""The distillation kernels on a GPU: every operation against fp64, determinism, compilation, far addresses."""

import warnings

import pytest
import torch

from indexcache.kernels.common.dispatch import forget_failures
from indexcache.kernels.indexer_distillation.indexer_distillation import (
    attention_lse,
    dense_indexer_kl,
    indexer_kl,
    selected_attention,
    selected_index_scores,
)
from indexcache.kernels.sparse_mla.sparse_mla import sparse_mla

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# B, S, T, H, D, K
SHAPES = [(2, 75, 1000, 32, 128, 300), (1, 50, 3000, 64, 128, 2048), (1, 33, 500, 20, 64, 65), (2, 9, 90, 8, 24, 17)]


def draw(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def problem(B, S, T, H, D, K, seed=0):
    """Index inputs, indices with -1 anywhere, a target; keys that nobody selects are NaN, one query selects none."""
    torch.manual_seed(seed)
    q, k, weights = draw(B, S, H, D), draw(B, T, D), draw(B, S, H) * H**-0.5
    indices = torch.rand(B, S, T, device="cuda").argsort(-1)[..., :K].int()
    indices[torch.rand(indices.shape, device="cuda") < 0.3] = -1
    indices[0, 0] = -1
    selected = torch.zeros(B, T + 1, dtype=torch.bool, device="cuda")
    selected.scatter_(1, torch.where(indices < 0, T, indices).flatten(1).long(), True)
    k[~selected[:, :T]] = float("nan")
    target = torch.rand(indices.shape, device="cuda") ** 4
    return q, k, weights, indices, target


def gradients(run, inputs, grad):
    """The result, and gradients of leaves made of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = run(*leaves)
    return result.detach(), torch.autograd.grad(result, leaves, grad.to(result.dtype))


def assert_close(ours, exact, inputs, tolerance=4e-3):
    """Values to fp32 sums of bf16 products; gradients to bf16's 2**-8 in norm."""
    (value, grads), (right, right_grads) = ours, exact
    torch.testing.assert_close(value.double(), right, atol=1e-3, rtol=1e-3)
    for one, other, like in zip(grads, right_grads, inputs):
        assert one.dtype == like.dtype and one.isfinite().all()
        assert (one - other).norm() <= tolerance * other.norm(), ((one - other).norm() / other.norm()).item()


def doubles(inputs):
    return [x.double().nan_to_num() for x in inputs]


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_gradients(shape):
    *inputs, indices, _ = problem(*shape)
    grad = torch.randn(indices.shape, device="cuda").masked_fill(indices < 0, 0.0)
    listed = indices >= 0
    run = lambda q, k, w: selected_index_scores(q, k, w, indices).masked_fill(~listed, 0.0)
    exact = gradients(run, doubles(inputs), grad)
    assert_close(gradients(run, inputs, grad), exact, inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_kl_and_gradients(shape):
    *inputs, indices, target = problem(*shape)
    target[-1, -1] = 0.0
    grad = (1 + torch.rand(indices.shape[:2], device="cuda")) * 1e-6
    run = lambda q, k, w: indexer_kl(q, k, w, indices, target)
    exact = gradients(run, doubles(inputs), grad)
    assert_close(gradients(run, inputs, grad), exact, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(run, inputs, grad)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(first[1], gradients(run, inputs, grad)[1]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(first, exact, inputs)


@pytest.mark.parametrize(("H", "D"), [(20, 576), (64, 576), (128, 576), (20, 80), (3, 40)])
def test_attention_of_selected_keys(H, D):
    _, _, _, indices, _ = problem(2, 40, 900, 8, 24, 300)
    q, kv = draw(2, 40, H, D), draw(2, 900, D)
    _, lse = sparse_mla(q, kv, indices, scale=0.06, value_dim=D)
    p = selected_attention(q, kv, lse, indices, scale=0.06)
    exact = selected_attention(q.double(), kv.double(), lse, indices, scale=0.06)
    assert (p[indices < 0] == 0).all()
    torch.testing.assert_close(p.double(), exact, atol=1e-6, rtol=2e-3)
    torch.testing.assert_close(p.sum(-1), (indices >= 0).any(-1).float(), atol=1e-3, rtol=0)


def dense_problem(B, S, T, H, D, layers, packed):
    torch.manual_seed(1)
    inputs = draw(B, S, H, D), draw(B, T, D), draw(B, S, H) * H**-0.5
    q_attn, kv = [draw(B, S, 20, 576) for _ in range(layers)], [draw(B, T, 576) for _ in range(layers)]
    visible = {"query_start": T - S - torch.arange(B, device="cuda") * 3}
    if packed:
        slots = visible["query_start"][:, None] + torch.arange(S, device="cuda")
        visible["key_start"] = (slots // 150 * 150).int()
        visible["key_start"][0, 0] = T
        visible["key_mask"] = torch.rand(B, T, device="cuda") < 0.9
    return inputs, q_attn, kv, visible


@pytest.mark.parametrize(
    ("B", "S", "T", "H", "D", "layers", "packed"),
    [(2, 150, 700, 32, 128, 2, True), (1, 400, 400, 32, 128, 1, False), (1, 77, 333, 20, 64, 1, True)],
)
def test_dense_kl_and_gradients(B, S, T, H, D, layers, packed):
    inputs, q_attn, kv, visible = dense_problem(B, S, T, H, D, layers, packed)
    grad = (1 + torch.rand(B, S, device="cuda")) * 1e-6
    run = lambda q, k, w: dense_indexer_kl(q, k, w, q_attn, kv, attn_scale=0.06, **visible)
    wide_q, wide_kv = doubles(q_attn), doubles(kv)
    wide = lambda q, k, w: dense_indexer_kl(q, k, w, wide_q, wide_kv, attn_scale=0.06, **visible)
    ours = gradients(run, inputs, grad)
    assert_close(ours, gradients(wide, doubles(inputs), grad), inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours[1], gradients(run, inputs, grad)[1]))
    lse = attention_lse(q_attn[0], kv[0], scale=0.06, **visible)
    exact = attention_lse(wide_q[0], wide_kv[0], scale=0.06, **visible)
    torch.testing.assert_close(lse.double(), exact, atol=1e-3, rtol=1e-3)


def test_losses_compile_in_one_graph_forward_and_backward():
    *inputs, indices, target = problem(*SHAPES[0])
    leaves = [x.nan_to_num() for x in inputs]
    _, q_attn, kv, visible = dense_problem(2, 75, 1000, 32, 128, 2, True)

    def loss(q, k, weights):
        sparse = indexer_kl(q, k, weights, indices, target)
        return sparse + dense_indexer_kl(q, k, weights, q_attn, kv, attn_scale=0.06, **visible)

    grad = torch.rand(2, 75, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        eager = gradients(loss, leaves, grad)
        traced = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), leaves, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(eager[0], traced[0])
    assert all(torch.equal(a, b) for a, b in zip(eager[1], traced[1]))


def test_keys_beyond_two_to_the_31_entries_are_found():
    T, window = 17_000_000, 1000
    far = torch.empty(1, T, 128, device="cuda", dtype=torch.bfloat16)
    q, far[:, T - window :], weights, indices, target = problem(1, 40, window, 32, 128, 300)
    near = far[:, T - window :].clone()
    moved = torch.where(indices < 0, -1, indices + T - window)
    grad = torch.rand(1, 40, device="cuda")
    kl, grads = gradients(lambda *x: indexer_kl(*x, moved, target), (q, far, weights), grad)
    exact = gradients(lambda *x: indexer_kl(*x, indices, target), doubles((q, near, weights)), grad)
    assert_close((kl, (grads[0], grads[1][:, T - window :], grads[2])), exact, (q, near, weights))
    assert not grads[1][:, : T - window].any()


def test_what_triton_does_not_take_runs_in_pytorch_and_says_so_once():
    *inputs, indices, target = problem(*SHAPES[3])
    wide = [x.float().nan_to_num() for x in inputs]
    forget_failures()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            indexer_kl(*wide, indices, target)
    assert len(caught) == 1 and "bfloat16 or float16" in str(caught[0].message)
