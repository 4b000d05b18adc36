"""Norms, RoPE, routing, experts and vector products in Triton's interpreter, and on a GPU where there is one.

Every kernel is compared with its meaning in fp64, and may err twice as much as PyTorch in the same precision does.
"""

import sys

import pytest
import torch

pytest.importorskip("triton")

from testing.grouped_mm_loop import grouped_mm

from indexcache.kernels.common.dispatch import no_fallback
from indexcache.kernels.experts import routed_experts
from indexcache.kernels.experts.expert_groups_triton import group_by_expert_triton
from indexcache.kernels.experts.expert_topk import expert_topk_reference
from indexcache.kernels.experts.expert_topk_triton import expert_topk_triton, normed_expert_topk_triton
from indexcache.kernels.experts.routed_experts import routed_experts_reference
from indexcache.kernels.experts.routed_experts_triton import experts_vector
from indexcache.kernels.norm_rope_linear.absorbed_vector import absorb_queries_reference
from indexcache.kernels.norm_rope_linear.absorbed_vector_triton import absorb_queries_triton, expand_values_triton
from indexcache.kernels.norm_rope_linear.cache_slot import CacheSlot
from indexcache.kernels.norm_rope_linear.index_keys import index_key_rows
from indexcache.kernels.norm_rope_linear.index_keys_triton import index_key_rows_triton
from indexcache.kernels.norm_rope_linear.rms_norm import latent_rows, rms_norm
from indexcache.kernels.norm_rope_linear.rms_norm_triton import latent_rows_triton, rms_norm_triton
from indexcache.kernels.norm_rope_linear.rotary import rotate
from indexcache.kernels.norm_rope_linear.rotary_triton import rotate_into_triton
from indexcache.kernels.norm_rope_linear.vector_linear import vector_linear_reference, wide_vector_linear
from indexcache.kernels.norm_rope_linear.vector_linear_triton import vector_linear_triton

# bf16 products are wrong in Triton's interpreter (3.9); fp16 has the same code path.
DTYPE = torch.float16
ON_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture(
    autouse=True,
    params=[pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=ON_A_GPU)],
)
def _device(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DTYPE", torch.float16 if request.param == "cpu" else torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(request.param):
        yield


def assert_as_exact_as(got, plain, exact):
    error, allowed = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * allowed + 1e-4 * exact.abs().max(), f"{error} against {allowed} of PyTorch"


def angles(batch, tokens, width):
    turn = torch.rand(batch, tokens, width // 2).repeat(1, 1, 2) * 6.28
    return turn.cos().to(DTYPE), turn.sin().to(DTYPE)


@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 1, 700), (9, 64)])
def test_rms_norm(shape):
    x, weight = torch.randn(shape, dtype=DTYPE), torch.randn(shape[-1], dtype=DTYPE)
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    assert_as_exact_as(rms_norm_triton(x, weight, 1e-6), rms_norm(x, weight, 1e-6, allow_triton=False), exact)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("angle_batch", "width", "turned"), [(1, 40, 16), (2, 128, 64), (2, 32, 32)])
def test_index_keys_of_strided_input(interleaved, angle_batch, width, turned):
    k = (3 * torch.randn(2, 37, width + 20, dtype=DTYPE) + 1)[..., 2 : 2 + width]
    weight, bias, turns = (*torch.randn(2, width, dtype=DTYPE), angles(angle_batch, 37, turned))
    wide = (k.double(), weight.double(), bias.double(), 1e-6, *(t.double() for t in turns), interleaved)
    got = index_key_rows_triton(k, weight, bias, 1e-6, *turns, interleaved)
    plain = index_key_rows(k, weight, bias, 1e-6, *turns, interleaved, allow_triton=False)
    assert_as_exact_as(got, plain, index_key_rows(*wide))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("angle_batch", [1, 2])
def test_latent_rows_of_strided_input(interleaved, angle_batch):
    kv = torch.randn(2, 7, 60, dtype=DTYPE)[..., 2:58]
    weight, turns = torch.randn(40, dtype=DTYPE), angles(angle_batch, 7, 16)
    wide = (kv.double(), weight.double(), 1e-6, *(t.double() for t in turns), interleaved)
    got = latent_rows_triton(kv, weight, 1e-6, *turns, interleaved)
    plain = latent_rows(kv, weight, 1e-6, *turns, interleaved, allow_triton=False)
    assert_as_exact_as(got, plain, latent_rows(*wide))


@pytest.mark.parametrize("first", [0, 5, 9, 40])
@pytest.mark.parametrize("kind", ["latents", "index keys"])
def test_rows_written_to_a_slot_of_a_cache_are_those_of_their_own_memory(kind, first):
    """What would go behind the end is dropped, and nothing else is touched."""
    x = torch.randn(2, 7, 64, dtype=DTYPE)
    gain, shift, turns = torch.randn(40, dtype=DTYPE), torch.randn(64, dtype=DTYPE), angles(2, 7, 24)
    turns = tuple(t[..., :16].contiguous() for t in turns)

    def make(slot):
        if kind == "latents":
            return latent_rows_triton(x[..., :56], gain, 1e-6, *turns, True, slot)
        return index_key_rows_triton(x, shift, shift, 1e-6, *turns, True, slot)

    expected = make(None)
    width = expected.shape[-1]
    memory = torch.randn(3, 2, 12, width, dtype=DTYPE)
    before = memory.clone()
    slot = CacheSlot(memory[1], torch.tensor([first]))
    assert slot.takes(expected)
    assert make(slot) is slot.rows
    fitting = max(0, min(7, 12 - first))
    before[1, :, first : first + fitting] = expected[:, :fitting]
    assert torch.equal(memory, before)


def test_slots_that_no_kernel_can_write_are_known():
    rows, position = torch.zeros(2, 12, 64, dtype=DTYPE), torch.zeros(1, dtype=torch.int64)
    new = torch.ones(2, 3, 64, dtype=DTYPE)
    assert CacheSlot(rows, position).takes(new)
    assert not CacheSlot(rows[..., :56], position).takes(new[..., :56])
    assert not CacheSlot(rows.float(), position).takes(new)
    assert torch.equal(CacheSlot(rows, position + 2).write(new)[:, 2:5], new)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("angle_batch", [1, 2])
def test_rotation_into_a_slice_and_in_place(interleaved, angle_batch):
    x, turns = torch.randn(2, 37, 3, 30, dtype=DTYPE), angles(angle_batch, 37, 16)
    turned = x[..., 5:21]
    exact = rotate(turned.double(), *(t.double() for t in turns), interleaved)
    plain = rotate(turned, *turns, interleaved)
    out = torch.full((2, 37, 3, 20), 7.0, dtype=DTYPE)
    rotate_into_triton(out[..., 4:], turned, *turns, interleaved)
    assert_as_exact_as(out[..., 4:], plain, exact)
    assert (out[..., :4] == 7).all()
    before = x.clone()
    rotate_into_triton(turned, turned, *turns, interleaved)
    assert_as_exact_as(turned, plain, exact)
    assert torch.equal(x[..., :5], before[..., :5])
    assert torch.equal(x[..., 21:], before[..., 21:])


@pytest.mark.parametrize(
    ("tokens", "count", "k", "width"),
    [(1, 8, 2, 48), (3, 40, 4, 700), (9, 64, 4, 130), (70, 24, 3, 200), (600, 160, 8, 64)],
)
@pytest.mark.parametrize("normalise", [True, False])
def test_routing(tokens, count, k, width, normalise):
    x, bias = torch.randn(tokens, width, dtype=DTYPE), torch.randn(count) * 0.1
    weight = torch.randn(count, width, dtype=DTYPE) / width**0.5
    logits, weights, experts = expert_topk_triton(x, weight, bias, k, 1.8, normalise)
    wide_logits = x.double() @ weight.double().T
    torch.testing.assert_close(logits.double(), wide_logits, atol=1e-5, rtol=1e-5)
    _, expected, chosen = expert_topk_reference(x, weight, bias, k, 1.8, normalise)
    (experts, order), (chosen, chosen_order) = experts.sort(-1), chosen.sort(-1)
    # Experts may differ where scores are equal within rounding.
    scores = wide_logits.sigmoid() + bias
    torch.testing.assert_close(scores.gather(1, experts).sum(-1), scores.gather(1, chosen).sum(-1))
    same = (experts == chosen).all(-1)
    assert same.float().mean() > 0.99
    got = weights.gather(1, order)[same]
    torch.testing.assert_close(got, expected.gather(1, chosen_order)[same], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "count", "width"), [(1, 16, 48), (3, 40, 700), (4, 64, 1100), (2, 64, 256)])
def test_routing_behind_a_norm_is_a_norm_and_then_routing(tokens, count, width):
    x, bias = 3 * torch.randn(tokens, width + 8, dtype=DTYPE)[:, 3 : 3 + width], torch.randn(count) * 0.1
    norm = torch.randn(width, dtype=DTYPE)
    weight = torch.randn(count, width, dtype=DTYPE) / width**0.5
    got, weights, experts = normed_expert_topk_triton(x, norm, 1e-6, weight, bias, 4, 1.8, True)
    exact = rms_norm(x.double(), norm.double(), 1e-6)
    assert_as_exact_as(got, rms_norm(x, norm, 1e-6, allow_triton=False), exact)
    _, expected, chosen = expert_topk_triton(got, weight, bias, 4, 1.8, True)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(experts, chosen)


@pytest.mark.parametrize("tokens", [2, 20])
def test_routing_prefers_the_first_of_equal_experts_and_survives_nan(tokens):
    x, bias = torch.ones(tokens, 16, dtype=DTYPE), torch.zeros(4)
    x[1] = float("nan")
    _, _, experts = expert_topk_triton(x, torch.ones(4, 16, dtype=DTYPE), bias, 2, 1.0, True)
    assert experts[0].tolist() == [0, 1]
    assert len(set(experts[1].tolist())) == 2
    assert 0 <= experts.min() <= experts.max() < 4


@pytest.mark.parametrize(
    ("tokens", "k", "count", "block"),
    [
        (1, 1, 2, 4),
        (700, 4, 16, 700),
        (700, 4, 64, 256),
        (300, 8, 160, 77),
        (1030, 2, 5, 1024),
        (0, 4, 16, 8),
        (90, 8, 512, 50),
    ],
)
def test_pairs_are_put_in_the_order_of_their_experts(tokens, k, count, block):
    scores = torch.rand(tokens, count)
    scores[:, count // 2] = -1 if tokens % 2 else 2  # chosen by none or by all
    experts = scores.topk(k, dim=-1).indices
    got = group_by_expert_triton(experts, count, block)
    expected = routed_experts.group_by_expert(experts, count, block, allow_triton=False)
    for mine, theirs in zip(got, expected):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def experts_problem(tokens, count, k, width, inner, shared_inner):
    def weight(*shape):
        return torch.randn(*shape, dtype=DTYPE) / shape[-1] ** 0.5

    # The last expert is never chosen.
    experts = torch.stack([torch.randperm(count - 1)[:k] for _ in range(tokens)])
    x, weights = torch.randn(tokens, width, dtype=DTYPE), torch.rand(tokens, k)
    arguments = (x, experts, weights, weight(count, 2 * inner, width), weight(count, width, inner))
    shared = None
    if shared_inner:
        shared = weight(shared_inner, width), weight(shared_inner, width), weight(width, shared_inner)
    return arguments, shared, torch.randn(tokens, width, dtype=DTYPE)


def in_double(arguments, shared):
    wide = [t.double() if t.is_floating_point() else t for t in arguments]
    return routed_experts_reference(*wide, None if shared is None else tuple(t.double() for t in shared))


@pytest.mark.parametrize("sizes", [(1, 8, 2, 48, 24, 40), (3, 6, 3, 200, 72, 16), (2, 5, 4, 64, 32, 0)])
@pytest.mark.parametrize("with_base", [True, False])
def test_experts_of_a_few_tokens(sizes, with_base):
    (x, experts, weights, gate_up, down), shared, base = experts_problem(*sizes)
    arguments = x, experts, weights, gate_up, down
    got = experts_vector(*arguments, shared, base if with_base else None)
    add = base if with_base else 0.0
    exact = in_double(arguments, shared) + add
    assert_as_exact_as(got, routed_experts_reference(*arguments, shared) + add, exact)


@pytest.mark.parametrize("block_bytes", [512 * 2**20, 12000])
@pytest.mark.parametrize("shared_inner", [24, 0])
def test_experts_of_many_tokens_in_blocks(monkeypatch, block_bytes, shared_inner):
    monkeypatch.setattr(routed_experts, "_grouped_mm", lambda: grouped_mm)
    monkeypatch.setattr(routed_experts, "BLOCK_BYTES", block_bytes)
    arguments, shared, base = experts_problem(37, 6, 3, 40, 24, shared_inner)
    exact = in_double(arguments, shared) + base
    plain = routed_experts_reference(*arguments, shared) + base
    out = base.clone()
    routed_experts._grouped(*arguments, shared, out, out)
    assert_as_exact_as(out, plain, exact)


@pytest.mark.parametrize(("tokens", "width", "sizes"), [(1, 48, [7]), (2, 200, [5, 64, 3]), (1, 3000, [9, 4, 2, 17])])
def test_linear_layers_side_by_side(tokens, width, sizes):
    x = torch.randn(tokens, width, dtype=DTYPE)
    weights = [torch.randn(size, width, dtype=DTYPE) / width**0.5 for size in sizes]
    exact = vector_linear_reference(x.double(), [weight.double() for weight in weights])
    assert_as_exact_as(vector_linear_triton(x, weights), vector_linear_reference(x, weights), exact)


@pytest.mark.parametrize(("tokens", "width", "sizes"), [(1, 700, (9, 30)), (2, 2048, (5,)), (2, 40, (13, 8, 3))])
def test_linear_layers_behind_a_norm_and_before_a_residual(tokens, width, sizes):
    x, norm = 3 * torch.randn(tokens, width, dtype=DTYPE), torch.randn(width, dtype=DTYPE)
    weights = [torch.randn(size, width, dtype=DTYPE) / width**0.5 for size in sizes]
    base = torch.randn(tokens, sum(sizes), dtype=DTYPE)
    for arguments in ((norm, 1e-5, None), (None, 0.0, base), (norm, 1e-5, base)):
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
        exact = vector_linear_reference(x.double(), [weight.double() for weight in weights], *wide)
        plain = vector_linear_reference(x, weights, *arguments)
        assert_as_exact_as(vector_linear_triton(x, weights, *arguments), plain, exact)


@pytest.mark.parametrize("weight_is_wide", [True, False])
@pytest.mark.parametrize(("tokens", "width", "size"), [(1, 48, 5), (2, 2100, 9)])
def test_scaled_products_in_fp32_of_one_or_two_tokens(tokens, width, size, weight_is_wide):
    weight_dtype = torch.float32 if weight_is_wide else DTYPE
    x, weight = torch.randn(tokens, width, dtype=DTYPE), torch.randn(size, width, dtype=weight_dtype) / width**0.5
    with no_fallback() as ran:
        got = wide_vector_linear(x, weight, 0.3)
    assert ran == [("wide_vector_linear", "Triton")]
    exact = 0.3 * (x.double() @ weight.double().T)
    assert got.dtype == torch.float32
    if weight_dtype == torch.float32:
        torch.testing.assert_close(got.double(), exact, atol=1e-6, rtol=1e-6)
    else:
        plain = (x.float() @ weight.float().T).to(DTYPE).float() * 0.3
        assert_as_exact_as(got, plain, exact)


@pytest.mark.parametrize("shape", [(1, 1, 3, 24, 8, 40, 20), (2, 1, 2, 16, 16, 100, 33), (1, 2, 2, 8, 6, 64, 16)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_absorbed_queries_and_expanded_values_of_a_few_tokens(shape, interleaved):
    batch, queries, heads, nope, rope, rank, value = shape
    q = torch.randn(batch, queries, heads, nope + rope, dtype=DTYPE)
    by_head = torch.randn(heads, nope + value, rank, dtype=DTYPE) / rank**0.5
    to_latent, to_value = by_head.split([nope, value], dim=1)
    for turns in (angles(1, queries, rope), angles(batch, queries, rope)):
        wide = [t.double() for t in (q, to_latent, *turns)]
        plain = absorb_queries_reference(q, to_latent, *turns, interleaved)
        got = absorb_queries_triton(q, to_latent, *turns, interleaved)
        assert_as_exact_as(got, plain, absorb_queries_reference(*wide, interleaved))
    latent_out = torch.randn(batch, queries, heads, rank, dtype=DTYPE)
    exact = torch.einsum("bshc,hvc->bshv", latent_out.double(), to_value.double())
    plain = torch.einsum("bshc,hvc->bshv", latent_out, to_value)
    assert_as_exact_as(expand_values_triton(latent_out, to_value), plain, exact)
