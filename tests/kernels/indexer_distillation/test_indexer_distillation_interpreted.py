"""The distillation kernels in Triton's interpreter, against the references in fp64."""

import pytest
import torch

pytest.importorskip("triton")

from indexcache.kernels.indexer_distillation import indexer_distillation_dense_triton as dense
from indexcache.kernels.indexer_distillation import indexer_distillation_ops as op
from indexcache.kernels.indexer_distillation import indexer_distillation_teacher_triton as teacher
from indexcache.kernels.indexer_distillation import indexer_distillation_triton as kernels
from indexcache.kernels.indexer_distillation.indexer_distillation_reference import (
    attention_lse_reference,
    dense_indexer_kl_reference,
    indexer_kl_reference,
    selected_attention_reference,
    selected_index_scores_reference,
)
from indexcache.kernels.sparse_mla.sparse_mla_reference import sparse_mla_reference

pytestmark = pytest.mark.interpreted
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
def test_slots_that_there_are_not_count_as_none(deterministic):
    q, k, weights, indices, target = problem(2, 4, 50, 8, 32, 24)
    outside = torch.where(indices < 0, 50 + torch.arange(24) * 10**7, indices).int()
    scale, lse = 0.2, torch.zeros(2, 4, 8)
    both = [kernels.selected_scores_triton(q, k, weights, chosen, scale) for chosen in (indices, outside)]
    assert torch.equal(*both)
    both = [kernels.selected_attention_triton(q, k, lse, chosen, scale) for chosen in (indices, outside)]
    assert torch.equal(*both)
    both = [kernels.indexer_kl_triton(q, k, weights, chosen, target, scale) for chosen in (indices, outside)]
    assert all(torch.equal(*pair) for pair in zip(*both))
    upstream = torch.ones(2, 4)
    both = [
        kernels.index_backward_triton(upstream, q, k, weights, chosen, target, stats, scale, deterministic)
        for chosen, (_, stats) in zip((indices, outside), both)
    ]
    assert all(torch.equal(*pair) for pair in zip(*both))


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


def dense_problem(B, S, T, H, D, layers, packed, seed=0):
    """Queries at slots T - S and up in the first row, lower in the others; one that sees nothing; packed documents."""
    g = torch.Generator().manual_seed(seed)
    indexer = [torch.randn(*shape, generator=g).to(DTYPE) for shape in ((B, S, H, D), (B, T, D), (B, S, H))]
    q_attn = [torch.randn(B, S, 3, 40, generator=g).to(DTYPE) for _ in range(layers)]
    kv = [torch.randn(B, T, 40, generator=g).to(DTYPE) for _ in range(layers)]
    q_attn[0] = q_attn[0].transpose(1, 2).contiguous().transpose(1, 2)  # head-major
    starts = T - S - torch.arange(B) * 3
    key_start = key_mask = None
    if packed:
        slots = starts[:, None] + torch.arange(S)
        key_start = (slots // 17 * 17).int()
        key_start[0, 0] = T  # sees nothing
        key_mask = torch.rand(B, T, generator=g) < 0.8
    return indexer, q_attn, kv, teacher.Visibility(starts, key_start, key_mask)


@pytest.mark.parametrize(
    ("B", "S", "T", "H", "D", "layers", "packed"),
    [(2, 9, 70, 8, 32, 1, True), (1, 21, 40, 20, 24, 2, False), (1, 5, 150, 32, 128, 1, True)],
)
def test_dense_kl_and_its_gradients_match_fp64(B, S, T, H, D, layers, packed, monkeypatch):
    # Several chunks of queries, the last one short.
    monkeypatch.setattr(teacher, "TARGET_SCRATCH_BYTES", 1)
    (q, k, weights), q_attn, kv, visible = dense_problem(B, S, T, H, D, layers, packed)
    inputs, scale = doubles(q, k, weights), D**-0.5
    exact_q, exact_kv = [x.double() for x in q_attn], [x.double() for x in kv]
    exact_lse = [attention_lse_reference(x, y, 0.2, *visible) for x, y in zip(exact_q, exact_kv)]
    expected = dense_indexer_kl_reference(*inputs, exact_q, exact_kv, exact_lse, scale, 0.2, *visible)
    lse = [teacher.attention_lse_triton(x, y, 0.2, *visible) for x, y in zip(q_attn, kv)]
    for one, right in zip(lse, exact_lse):
        torch.testing.assert_close(one.double(), right, atol=1e-4, rtol=1e-4)
    kl, score_lse = dense.dense_kl_triton(q, k, weights, q_attn, kv, lse, scale, 0.2, *visible)
    torch.testing.assert_close(kl.double(), expected.detach(), atol=2e-4, rtol=2e-4)
    if packed:
        assert kl[0, 0] == 0
    grad = 1e-6 * (1 + torch.rand(kl.shape, generator=torch.Generator().manual_seed(1)))
    right = torch.autograd.grad(expected, inputs, grad.double())
    arguments = (q, k, weights, q_attn, kv, lse, score_lse, scale, 0.2, *visible)
    # As above: compare what fp32 would hold.
    results = dense.dense_kl_backward_triton(grad * 2.0**14, *arguments)
    assert_gradients([x.double() * 2.0**-14 for x in results], right)


def test_dense_loss_of_nothing():
    (q, k, weights), q_attn, kv, visible = dense_problem(1, 4, 20, 8, 16, 1, False)
    lse = [teacher.attention_lse_triton(q_attn[0][:, :0], kv[0], 0.2, *visible)]
    arguments = (q[:, :0], k, weights[:, :0], [q_attn[0][:, :0]], kv, lse)
    kl, score_lse = dense.dense_kl_triton(*arguments, 1.0, 0.2, *visible)
    assert kl.shape == (1, 0)
    gradients = dense.dense_kl_backward_triton(kl, *arguments, score_lse, 1.0, 0.2, *visible)
    assert all((gradient == 0).all() for gradient in gradients)


def op_calls():
    """Every custom op with small arguments; the first three have gradients in those that are differentiable."""
    q, k, weights, indices, target = problem(1, 3, 30, 8, 16, 20)
    inputs = [x.nan_to_num().requires_grad_() for x in (q, k, weights)]
    _, q_attn, kv, visible = dense_problem(1, 3, 30, 8, 16, 2, True)
    lse = [teacher.attention_lse_triton(x, y, 0.4, *visible) for x, y in zip(q_attn, kv)]
    return {
        "scores": (op._selected_index_scores, (*inputs, indices, 0.4)),
        "kl": (op._indexer_kl, (*inputs, indices, target.nan_to_num(), 0.4)),
        "attention": (op._selected_attention, (q_attn[0], kv[0], lse[0], indices, 0.4)),
        "lse": (op._attention_lse, (q_attn[0], kv[0], 0.4, *visible)),
        "dense": (op._dense_indexer_kl, (*inputs, q_attn, kv, lse, 0.4, 0.4, *visible)),
    }


@pytest.mark.parametrize("name", ["scores", "kl", "attention", "lse", "dense"])
def test_custom_ops_trace_and_differentiate_as_they_run(name):
    call, arguments = op_calls()[name]
    torch.library.opcheck(call, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    compiled = torch.compile(lambda *x: call(*x), fullgraph=True, backend="aot_eager")

    def value(result):
        return (result[0] if isinstance(result, tuple) else result).nan_to_num(neginf=0.0)

    eager, traced = value(call(*arguments)), value(compiled(*arguments))
    assert torch.equal(eager, traced)
    if name in ("scores", "kl", "dense"):
        for one, other in zip(*(torch.autograd.grad(x.sum(), arguments[:3]) for x in (eager, traced))):
            assert torch.equal(one, other) and one.abs().sum() > 0
