import pytest
import torch

from indexcache.kernels.sparse_mla import sparse_mla as op
from indexcache.kernels.sparse_mla import sparse_mla_reference as reference
from indexcache.kernels.sparse_mla.sparse_mla import sparse_mla


def problem(B=2, S=5, T=30, H=3, D=12, K=7, dtype=torch.float64):
    """Random inputs, indices in any order with -1 anywhere, one query without keys."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, S, H, D, generator=g, dtype=torch.float64).to(dtype)
    kv = torch.randn(B, T, D, generator=g, dtype=torch.float64).to(dtype)
    indices = torch.rand(B, S, T, generator=g).argsort(-1)[..., :K].int()
    indices[torch.rand(indices.shape, generator=g) < 0.3] = -1
    indices[0, 1] = -1
    return q, kv, indices


def test_equals_dense_attention_over_the_selected_keys():
    q, kv, indices = problem()
    out, lse = sparse_mla(q, kv, indices, scale=0.3, value_dim=8)
    for b in range(q.shape[0]):
        for s in range(q.shape[1]):
            keys = kv[b, indices[b, s][indices[b, s] >= 0].long()]
            scores = q[b, s] @ keys.T * 0.3
            torch.testing.assert_close(lse[b, s], scores.logsumexp(-1))
            torch.testing.assert_close(out[b, s], scores.softmax(-1) @ keys[:, :8])


def test_a_query_without_keys_gives_zeros_and_minus_infinity():
    q, kv, indices = problem()
    out, lse = sparse_mla(q, kv, indices, scale=0.3, value_dim=8)
    assert (out[0, 1] == 0).all() and (lse[0, 1] == float("-inf")).all()


def test_nan_in_latents_that_nobody_selects_changes_nothing():
    q, kv, indices = problem()
    expected = sparse_mla(q, kv, indices, scale=0.3, value_dim=8)
    for b in range(2):
        unused = torch.ones(kv.shape[1], dtype=torch.bool)
        unused[indices[b][indices[b] >= 0].long()] = False
        kv[b, unused] = float("nan")
    for before, after in zip(expected, sparse_mla(q, kv, indices, scale=0.3, value_dim=8)):
        assert torch.equal(before, after)


def test_gradients_are_exact():
    q, kv, indices = problem(B=1, S=3, T=8, H=2, D=4, K=4)
    arguments = q.requires_grad_(), kv.requires_grad_()
    # A query without keys has no gradient through its lse.
    run = lambda q, kv: [x[:, [0, 2]] for x in sparse_mla(q, kv, indices, scale=0.3, value_dim=3)]
    assert torch.autograd.gradcheck(run, arguments)


def test_the_custom_op_traces_with_its_fake_kernel():
    q, kv, indices = problem(dtype=torch.bfloat16)
    torch.library.opcheck(op._sparse_mla, (q, kv, indices, 0.3, 8))
    compiled = torch.compile(lambda *x: op._sparse_mla(*x, 0.3, 8), fullgraph=True, backend="aot_eager")
    for eager, traced in zip(op._sparse_mla(q, kv, indices, 0.3, 8), compiled(q, kv, indices)):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float32}, "bfloat16 or float16"),
        ({"H": 129, "dtype": torch.float16}, "129 heads"),
        ({"D": 600, "dtype": torch.float16}, "width 600"),
    ],
)
def test_what_the_kernels_do_not_take_is_said_in_words(change, words):
    pytest.importorskip("triton")
    q, kv, indices = problem(**change)
    assert words in op._why_not_triton(q, kv, indices, 1.0, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(1, 2, 3)}, "do not fit"),
        ({"indices": torch.zeros(1, 2, 4)}, "int32"),
        ({"value_dim": 9}, "value_dim must be from 1 to 8"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, words):
    arguments = {
        "q": torch.zeros(1, 2, 3, 8),
        "kv": torch.zeros(1, 5, 8),
        "indices": torch.zeros(1, 2, 4, dtype=torch.int32),
        "scale": 1.0,
        "value_dim": 4,
    } | change
    with pytest.raises(ValueError, match=words):
        sparse_mla(**arguments)


def test_the_operation_in_pytorch_has_the_gradient_of_its_reference(monkeypatch):
    """As an operation of its own, which compiled and exported models hold, it records nothing to differentiate."""
    monkeypatch.setattr(reference, "GATHER_BLOCK_BYTES", 2000)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 3, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    kv = torch.randn(2, 9, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    indices = torch.rand(2, 7, 9, generator=generator).argsort(-1)[..., :5].int()
    indices[0, 1, 3:] = -1
    indices[1, 2] = -1  # sees no key
    grad_out = torch.randn(2, 7, 3, 8, dtype=torch.float64, generator=generator)
    grad_lse = torch.randn(2, 7, 3, dtype=torch.float64, generator=generator)

    def gradients(attend, *more):
        out, lse = attend(q, kv, indices, 0.3, 8, *more)
        total = (out * grad_out).sum() + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse).sum()
        return torch.autograd.grad(total, (q, kv))

    for got, expected in zip(gradients(op._sparse_mla, False), gradients(reference.sparse_mla_reference)):
        torch.testing.assert_close(got, expected)
