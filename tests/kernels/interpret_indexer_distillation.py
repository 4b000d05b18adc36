"""Run by test_indexer_distillation_triton.py in a process of its own, with TRITON_INTERPRET=1."""

import pytest
import torch

from indexcache.kernels import indexer_distillation_triton as kernels
from indexcache.kernels.indexer_distillation_reference import (
    indexer_kl_reference,
    selected_attention_reference,
    selected_index_scores_reference,
)
from indexcache.kernels.sparse_mla_reference import sparse_mla_reference

# bf16 products are wrong in Triton's interpreter (3.9); fp16 has the same code path.
DTYPE = torch.float16
SHAPES = [(2, 4, 50, 8, 32, 24), (1, 3, 150, 32, 128, 130), (1, 2, 40, 20, 24, 17), (1, 2, 9, 3, 8, 1)]


def problem(B, S, T, H, D, K, seed=0):
    """Indices in any order with -1 anywhere; keys that nobody selects are NaN, one query selects none."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, S, H, D, generator=g).to(DTYPE)
    k = torch.randn(B, T, D, generator=g).to(DTYPE)
    weights = torch.randn(B, S, H, generator=g)
    indices = torch.rand(B, S, T, generator=g).argsort(-1)[..., :K].int()
    indices[torch.rand(indices.shape, generator=g) < 0.3] = -1
    indices[0, 0] = -1
    indices[0, 1, 0] = 3
    selected = torch.zeros(B, T + 1, dtype=torch.bool)
    selected.scatter_(1, torch.where(indices < 0, T, indices).flatten(1).long(), True)
    k[~selected[:, :T]] = float("nan")
    target = torch.rand(indices.shape, generator=g) ** 4
    target[indices < 0] = float("nan")
    return q, k, weights, indices, target


def doubles(q, k, weights):
    return [x.double().nan_to_num().requires_grad_() for x in (q, k, weights)]


def assert_gradients(ours, expected):
    for one, right in zip(ours, expected):
        assert one.isfinite().all()
        assert (one.double() - right).norm() <= 3e-3 * right.norm() + 1e-12


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_their_gradients_match_fp64(shape, deterministic):
    q, k, weights, indices, _ = problem(*shape)
    inputs, scale = doubles(q, k, weights), shape[4] ** -0.5
    expected = selected_index_scores_reference(*inputs, indices, scale)
    scores = kernels.selected_scores_triton(q, k, weights, indices, scale)
    assert (scores[indices < 0] == float("-inf")).all()
    torch.testing.assert_close(scores.double(), expected.detach(), atol=1e-4, rtol=1e-4)
    grad = torch.randn(indices.shape, generator=torch.Generator().manual_seed(1)).masked_fill(indices < 0, 0.0)
    right = torch.autograd.grad(expected, inputs, grad.double())
    arguments = (grad.masked_fill(indices < 0, float("nan")), q, k, weights, indices, None, None, scale)
    assert_gradients(kernels.index_backward_triton(*arguments, deterministic), right)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_and_its_gradients_match_fp64(shape, deterministic, monkeypatch):
    monkeypatch.setattr(kernels, "DETERMINISTIC_SCRATCH_BYTES", 40_000)
    q, k, weights, indices, target = problem(*shape)
    target[-1, -1] = 0.0  # a query with keys and without a target
    inputs, scale = doubles(q, k, weights), shape[4] ** -0.5
    expected = indexer_kl_reference(*inputs, indices, target.double(), scale)
    kl, stats = kernels.indexer_kl_triton(q, k, weights, indices, target, scale)
    assert kl[0, 0] == 0 and kl[-1, -1] == 0
    torch.testing.assert_close(kl.double(), expected.detach(), atol=1e-4, rtol=1e-4)
    grad = 1e-6 * (1 + torch.rand(kl.shape, generator=torch.Generator().manual_seed(1)))
    right = torch.autograd.grad(expected, inputs, grad.double())
    arguments = (grad, q.nan_to_num(), k, weights, indices, target, stats, scale)
    # Key gradients are of the size of 1e-6 times a probability: beneath fp16, so compare what fp32 would hold.
    results = kernels.index_backward_triton(grad * 2.0**14, *arguments[1:], deterministic)
    assert_gradients([x.double() * 2.0**-14 for x in results], right)


@pytest.mark.parametrize(
    ("B", "S", "T", "H", "D", "K"), [(2, 3, 50, 20, 40, 24), (1, 3, 60, 72, 48, 33), (1, 2, 9, 3, 24, 1)]
)
def test_attention_of_selected_keys_matches_fp64(B, S, T, H, D, K):
    g = torch.Generator().manual_seed(4)
    _, kv, _, indices, _ = problem(B, S, T, 8, D, K)
    q = torch.randn(B, S, H, D, generator=g).to(DTYPE)
    _, lse = sparse_mla_reference(q.double(), kv.double(), indices, 0.2, D)
    expected = selected_attention_reference(q.double(), kv.double(), lse, indices, 0.2)
    p = kernels.selected_attention_triton(q, kv, lse.float(), indices, 0.2)
    assert (p[indices < 0] == 0).all()
    torch.testing.assert_close(p.double(), expected, atol=1e-5, rtol=1e-4)


def test_nothing_selected_and_nothing_asked():
    q, k, weights, indices, target = problem(*SHAPES[0])
    for rows, keys in ((slice(None), slice(0)), (slice(0), slice(None))):
        arguments = (q[:, rows], k, weights[:, rows], indices[:, rows, keys])
        kl, stats = kernels.indexer_kl_triton(*arguments, target[:, rows, keys], 1.0)
        assert (kl == 0).all()
        gradients = kernels.index_backward_triton(kl, *arguments, target[:, rows, keys], stats, 1.0, False)
        assert all((gradient == 0).all() for gradient in gradients)
