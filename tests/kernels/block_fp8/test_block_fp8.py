"""Block fp8 in PyTorch: against transformers' own arithmetic, against single elements; what the operations refuse."""

import pytest
import torch
import torch.nn.functional as F

from indexcache.kernels.block_fp8 import block_fp8_format as fp8
from indexcache.kernels.block_fp8 import block_fp8_reference as reference
from indexcache.kernels.block_fp8.block_fp8_experts import block_fp8_experts
from indexcache.kernels.block_fp8.block_fp8_linear import block_fp8_linear, block_fp8_vector_linear
from indexcache.kernels.experts.routed_experts import routed_experts_reference

SHAPES = [(576, 256, (128, 128)), (300, 200, (128, 128)), (40, 56, (16, 16)), (5, 3, (4, 2)), (128, 1, (128, 128))]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def weight_of(rows, columns, block=(128, 128), ue8m0=False):
    return fp8.quantise_weight(torch.randn(rows, columns), block, ue8m0)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_dequantises_as_transformers_does_and_ragged_blocks_too(rows, columns, block, ue8m0):
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    weight, scales = weight_of(rows, columns, block, ue8m0)
    got = fp8.dequantise(weight, scales, block, torch.float32)
    assert torch.equal(got, _dequantize_fp8_weight(weight, scales.float(), list(block), torch.float32))
    assert torch.equal(fp8.dequantise(weight, scales, block), got.bfloat16())
    stacked = fp8.dequantise(weight.expand(2, 1, -1, -1), scales.expand(2, 1, -1, -1), block, torch.float32)
    assert torch.equal(stacked, got.expand(2, 1, -1, -1))


def test_slabs_join_without_a_seam(monkeypatch):
    weight, scales = weight_of(576, 256)
    x = torch.randn(3, 256)
    whole = fp8.dequantise(weight, scales, dtype=torch.float32)
    monkeypatch.setattr(fp8, "SLAB", 200 * 256)
    assert len(fp8.slabs(576, 256, 128)) == 5
    assert torch.equal(fp8.dequantise(weight, scales, dtype=torch.float32), whole)
    torch.testing.assert_close(reference.linear_reference(x, weight, scales), F.linear(x, whole))


@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_quantised_weights_are_as_near_as_e4m3_can_be(rows, columns, block):
    wide = torch.randn(rows, columns)
    weight, scales = fp8.quantise_weight(wide, block)
    back = fp8.dequantise(weight, scales, block, torch.float32)
    # Half a step of three bits; below the smallest normal number half a step of 2^-9.
    by_row = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    assert ((back - wide).abs() <= torch.maximum(wide.abs() / 16, by_row * 2**-10) * (1 + 1e-5)).all()
    again, same = fp8.quantise_weight(back, block)
    assert torch.equal(again.float() * 1, weight.float()) and torch.allclose(same, scales)


def test_zero_weights_and_activations_stay_zero():
    weight, scales = fp8.quantise_weight(torch.zeros(130, 140), ue8m0=True)
    assert not fp8.dequantise(weight, scales).any()
    values, factors = reference.quantise_activations(torch.zeros(2, 140))
    assert not values.float().any() and (factors == 1).all() and factors.shape == (2, 2)


@pytest.mark.parametrize("width", [128, 200, 1])
def test_activations_are_scaled_by_token_and_128_columns(width):
    x = torch.randn(5, width) * torch.tensor([1.0, 1e-3, 100.0, 1e4, 1.0])[:, None]
    values, factors = reference.quantise_activations(x)
    for row in range(5):
        for group in range(factors.shape[1]):
            part = slice(128 * group, 128 * group + 128)
            torch.testing.assert_close(factors[row, group], x[row, part].abs().max() / 448)
            assert values[row, part].float().abs().max() == 448
    back = values.float() * factors.repeat_interleave(128, 1)[:, :width]
    limit = torch.maximum(x.abs() / 16, factors.repeat_interleave(128, 1)[:, :width] * 2**-10)
    assert ((back - x).abs() <= limit * (1 + 1e-5)).all()


def test_quantised_products_are_those_of_what_was_quantised():
    """The order of sums aside, promotion every 128 columns changes nothing in exact arithmetic."""
    weight, scales = weight_of(300, 400)
    x = torch.randn(7, 400, dtype=torch.float64)
    values, factors = reference.quantise_activations(x)
    exact = (values.double() * factors.double().repeat_interleave(128, 1)[:, :400]) @ fp8.dequantise(
        weight, scales, dtype=torch.float64
    ).t()
    torch.testing.assert_close(reference.quantised_linear_reference(x, weight, scales), exact)
    plain = reference.linear_reference(x, weight, scales)
    relative = (exact - plain).square().mean().sqrt() / plain.square().mean().sqrt()
    assert 0.005 < relative < 0.04  # e4m3 activations cost so much, and no more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_on_a_cpu_is_that_of_the_dequantised_weight(dtype):
    weight, scales = weight_of(576, 200)
    x, base = torch.randn(5, 200, dtype=dtype), torch.randn(576, dtype=dtype).expand(5, -1)
    expected = F.linear(x, fp8.dequantise(weight, scales, dtype=dtype)) + base
    assert torch.equal(block_fp8_linear(x, weight, scales, base=base), expected)
    out = torch.empty(5, 576, dtype=dtype)
    assert block_fp8_linear(x, weight, scales, base=base, out=out) is out and torch.equal(out, expected)
    assert block_fp8_linear(x[:0], weight, scales).shape == (0, 576)
    assert block_fp8_linear(x, weight[:0], scales[:0]).shape == (5, 0)


def test_several_layers_side_by_side():
    first, second = weight_of(576, 200), weight_of(32, 200)
    x = torch.randn(2, 200)
    got = block_fp8_vector_linear(x, [first[0], second[0]], [first[1], second[1]])
    parts = [block_fp8_linear(x, *matrix) for matrix in (first, second)]
    assert torch.equal(got, torch.cat(parts, 1))


def experts_of(count, inner, width, block):
    halves = [[weight_of(inner, width, block) for _ in range(2)] for _ in range(count)]
    downs = [weight_of(width, inner, block) for _ in range(count)]
    gate_up = tuple(torch.stack([torch.cat([half[i] for half in pair]) for pair in halves]) for i in range(2))
    return gate_up, tuple(torch.stack([down[i] for down in downs]) for i in range(2))


@pytest.mark.parametrize("block", [(128, 128), (16, 16)])
def test_experts_on_a_cpu_are_those_of_the_dequantised_weights(block):
    """24 rows in blocks of 16: gate and up have each a ragged block of their own."""
    gate_up, down = experts_of(4, 24, 40, block)
    shared = tuple(weight_of(*shape, block) for shape in ((24, 40), (24, 40), (40, 24)))
    x = torch.randn(6, 40)
    experts = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    weights = torch.rand(6, 2)
    wide = [fp8.dequantise(*matrix, block, torch.float32) for matrix in (down, *shared)]
    halves = zip(gate_up[0].chunk(2, 1), gate_up[1].chunk(2, 1))
    both = torch.cat([fp8.dequantise(*half, block, torch.float32) for half in halves], 1)
    expected = routed_experts_reference(x, experts, weights, both, wide[0], tuple(wide[1:]))
    got = block_fp8_experts(x, experts, weights, gate_up, down, shared=shared, block_size=block)
    torch.testing.assert_close(got, expected)
    added = x.clone()
    block_fp8_experts(x, experts, weights, gate_up, down, shared=shared, accumulate=added, block_size=block)
    torch.testing.assert_close(added, x + expected)
    assert block_fp8_experts(x[:0], experts[:0], weights[:0], gate_up, down, block_size=block).shape == (0, 40)


def test_what_does_not_fit_is_refused_by_name():
    weight, scales = weight_of(576, 200)
    x = torch.randn(2, 200)
    with pytest.raises(ValueError, match=r"weight of \(576, 200\) in blocks of 128 x 128 has scales of \(5, 2\), got"):
        block_fp8_linear(x, weight, scales[:4])
    with pytest.raises(ValueError, match=r"weight must be float8_e4m3fn, got torch.float32"):
        block_fp8_linear(x, weight.float(), scales)
    with pytest.raises(ValueError, match=r"scales must be float32 or float8_e8m0fnu, got torch.bfloat16"):
        block_fp8_linear(x, weight, scales.bfloat16())
    with pytest.raises(ValueError, match=r"weight must be \[N, D\] of x's D = \(576, 199\)"):
        block_fp8_linear(x[:, :199], weight, scales)
    with pytest.raises(ValueError, match=r"base must be float32 \[T, N\]"):
        block_fp8_linear(x, weight, scales, base=torch.randn(2, 575))
    with pytest.raises(TypeError, match="weight and its scales must be tensors, got None"):
        block_fp8_linear(x, weight, None)
    with pytest.raises(ValueError, match="as many scales as weights"):
        block_fp8_vector_linear(x, [weight], [])
    gate_up, down = experts_of(3, 24, 40, (16, 16))
    x, experts, weights = torch.randn(2, 40), torch.tensor([[0, 1], [2, 0]]), torch.rand(2, 2)
    with pytest.raises(ValueError, match=r"gate_up of .* has scales of \(3, 4, 3\), got \(3, 3, 3\)"):
        block_fp8_experts(x, experts, weights, (gate_up[0], gate_up[1][:, :3]), down, block_size=(16, 16))
    with pytest.raises(IndexError, match=r"experts\[1, 0\] is 5, but there are 3"):
        block_fp8_experts(x, experts + 3, weights, gate_up, down, block_size=(16, 16))
