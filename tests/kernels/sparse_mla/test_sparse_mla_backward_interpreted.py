"""Gradients of sparse MLA in Triton's interpreter, against autograd of the reference in fp64."""

import pytest
import torch

pytest.importorskip("triton")

from indexcache.kernels.common.device_target import TARGETS, pretended_target
from indexcache.kernels.common.dispatch import forget_failures
from indexcache.kernels.sparse_mla import sparse_mla_backward_triton as kernels
from indexcache.kernels.sparse_mla import sparse_mla_triton
from indexcache.kernels.sparse_mla.sparse_mla import _sparse_mla
from indexcache.kernels.sparse_mla.sparse_mla_reference import sparse_mla_reference

pytestmark = pytest.mark.interpreted
# bf16 products are wrong in Triton's interpreter (3.9); fp16 has the same code path.
DTYPE = torch.float16


def problem(B, S, T, H, D, V, K, order="ascending", seed=0):
    """Inputs and upstream gradients; latents that nobody selects are NaN, one query has no keys."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, S, H, D, generator=g).to(DTYPE)
    kv = torch.randn(B, T, D, generator=g).to(DTYPE)
    indices = torch.rand(B, S, T, generator=g).argsort(-1)[..., :K].int()
    if order == "ascending":
        used = torch.randint(0, K + 1, (B, S, 1), generator=g)
        indices = torch.where(torch.arange(K) < used, indices.sort(-1).values, -1)
    else:
        indices[torch.rand(indices.shape, generator=g) < 0.3] = -1
    indices[0, 0] = -1
    selected = torch.zeros(B, T + 1, dtype=torch.bool)
    selected.scatter_(1, torch.where(indices < 0, T, indices).flatten(1).long(), True)
    kv[~selected[:, :T]] = float("nan")
    grad_out = torch.randn(B, S, H, V, generator=g).to(DTYPE)
    grad_lse = torch.randn(B, S, H, generator=g)
    grad_lse[(indices < 0).all(-1)] = float("nan")
    return q, kv, indices, grad_out, grad_lse


def exact(q, kv, indices, grad_out, grad_lse, scale):
    inputs = q.double().requires_grad_(), kv.double().nan_to_num().requires_grad_()
    out, lse = sparse_mla_reference(*inputs, indices, scale, grad_out.shape[-1])
    empty = lse == float("-inf")
    loss = (out * grad_out.double()).sum() + (lse * grad_lse.double()).masked_fill(empty, 0.0).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, inputs)


def assert_gradients(results, expected):
    for ours, right in zip(results, expected):
        assert ours.isfinite().all()
        assert (ours.double() - right).norm() <= 2e-3 * right.norm()


def run(q, kv, indices, grad_out, grad_lse, scale, deterministic=False):
    out, lse, expected = exact(q, kv, indices, grad_out, grad_lse, scale)
    arguments = (grad_out, grad_lse, q, kv, indices, out.to(DTYPE), lse.float(), scale)
    return kernels.sparse_mla_backward_triton(*arguments, deterministic), expected


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("groups", [(), (80,)])
def test_slots_that_there_are_not_have_no_gradient(monkeypatch, deterministic, groups):
    monkeypatch.setattr(sparse_mla_triton, "GROUPING_ARCHITECTURES", groups)
    arguments = problem(2, 5, 40, 8, 40, 32, 24, "scattered")
    q, kv, indices, *grads = arguments
    out, lse, expected = exact(*arguments, 0.2)
    outside = torch.where(indices < 0, 40 + torch.arange(24), indices).int()
    rest = (out.to(DTYPE), lse.float(), 0.2, deterministic)
    assert_gradients(kernels.sparse_mla_backward_triton(*grads, q, kv, outside, *rest), expected)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("order", ["ascending", "scattered"])
@pytest.mark.parametrize(
    ("B", "S", "T", "H", "D", "V", "K"),
    [(2, 5, 40, 20, 40, 32, 24), (1, 3, 30, 40, 48, 48, 17), (1, 2, 70, 72, 80, 64, 33), (1, 2, 9, 3, 24, 20, 1)],
)
def test_gradients_match_fp64(B, S, T, H, D, V, K, order, deterministic):
    assert_gradients(*run(*problem(B, S, T, H, D, V, K, order), D**-0.5, deterministic))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("heads", [20, 70])
def test_without_grouping_they_are_the_same(monkeypatch, heads, deterministic):
    monkeypatch.setattr(sparse_mla_triton, "GROUPING_ARCHITECTURES", ())
    assert_gradients(*run(*problem(1, 4, 40, heads, 40, 32, 20, "scattered"), 0.2, deterministic))


def test_chunks_of_the_deterministic_mode_add_up(monkeypatch):
    inputs = problem(2, 7, 40, 20, 40, 32, 20)
    whole, _ = run(*inputs, 0.2, deterministic=True)
    monkeypatch.setattr(kernels, "DETERMINISTIC_SCRATCH_BYTES", 1)
    assert all(torch.equal(one, other) for one, other in zip(whole, run(*inputs, 0.2, deterministic=True)[0]))
    monkeypatch.setattr(kernels, "QUERIES_PER_LAUNCH", 8)
    assert_gradients(*run(*inputs, 0.2, deterministic=True))


def test_strided_inputs_and_gradients_are_read_right():
    q, kv, indices, grad_out, grad_lse = problem(2, 4, 30, 4, 40, 32, 16)
    cache = torch.full((2, 64, 48), float("nan"), dtype=DTYPE)
    cache[:, :30, :40] = kv
    wide = torch.full((2, 4, 8, 40), float("nan"), dtype=DTYPE)
    wide[:, :, ::2] = q
    grad_out = grad_out[:, :1, :1, :1].expand(2, 4, 4, 32)
    assert_gradients(*run(wide[:, :, ::2], cache[:, :30, :40], indices, grad_out, grad_lse, 0.2))


def test_nothing_selected_and_nothing_asked():
    q, kv, indices, grad_out, grad_lse = problem(1, 3, 20, 4, 40, 32, 8)
    for rows, keys in ((slice(None), slice(0)), (slice(0), slice(None))):
        arguments = (grad_out[:, rows], grad_lse[:, rows], q[:, rows], kv, indices[:, rows, keys])
        lse = torch.full(grad_lse[:, rows].shape, float("-inf"))
        results = kernels.sparse_mla_backward_triton(*arguments, grad_out[:, rows], lse, 0.2, False)
        assert all((gradient == 0).all() for gradient in results)


def test_the_custom_op_differentiates_eagerly_and_traced():
    q, kv, indices, grad_out, grad_lse = problem(1, 3, 20, 4, 40, 32, 8)
    kv = kv.nan_to_num()
    grad_lse = grad_lse.nan_to_num()
    _, _, expected = exact(q, kv, indices, grad_out, grad_lse, 0.2)
    inputs = q.requires_grad_(), kv.requires_grad_()
    compiled = torch.compile(lambda *x: _sparse_mla(*x, 0.2, 32), fullgraph=True, backend="aot_eager")
    for results in (_sparse_mla(*inputs, indices, 0.2, 32), compiled(*inputs, indices)):
        assert_gradients(torch.autograd.grad(results, inputs, (grad_out, grad_lse)), expected)
        only_out = torch.autograd.grad(compiled(*inputs, indices)[0].sum(), inputs)
        assert all(x.isfinite().all() and x.abs().sum() > 0 for x in only_out)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_hopper_kernel_that_fails_is_replaced_and_said_so(monkeypatch, deterministic):
    def fail(*arguments):
        raise AttributeError("no such thing in this Triton")

    forget_failures()
    monkeypatch.setattr(kernels, "hopper_backward_supports", lambda *tensors: True)
    monkeypatch.setattr(kernels, "sparse_mla_backward_hopper", fail)
    inputs = problem(1, 3, 40, 64, 40, 32, 20)
    with pretended_target(TARGETS["sm_90"]):
        with pytest.warns(UserWarning, match="no such thing in this Triton"):
            assert_gradients(*run(*inputs, 0.2, deterministic))
        assert_gradients(*run(*inputs, 0.2, deterministic))
    forget_failures()
