"""The block fp8 kernels on a GPU: released shapes and odd ones, 64-bit offsets, repeats, graphs, torch.compile."""

import pytest
import torch

from indexcache.kernels.block_fp8.block_fp8_experts import block_fp8_experts, block_fp8_experts_reference
from indexcache.kernels.block_fp8.block_fp8_format import E4M3, scale_grid
from indexcache.kernels.block_fp8.block_fp8_linear import (
    WIDENED_TOKENS,
    block_fp8_linear,
    block_fp8_vector_linear,
    multiplies_e4m3,
)
from indexcache.kernels.block_fp8.block_fp8_reference import linear_reference, quantise_activations
from indexcache.kernels.common.dispatch import no_fallback

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _strict():
    pytest.importorskip("triton")
    torch.manual_seed(0)
    with no_fallback():
        yield


def matrix(*shape, ue8m0=False):
    """Random codes from 0.125 to 240, of both signs, and scales."""
    codes = torch.randint(0x20, 0x78, shape, dtype=torch.uint8, device="cuda")
    codes |= torch.randint(0, 2, shape, dtype=torch.uint8, device="cuda") << 7
    grid = (*shape[:-2], *scale_grid(*shape[-2:], (128, 128)))
    if ue8m0:
        return codes.view(E4M3), torch.randint(113, 117, grid, dtype=torch.uint8, device="cuda").view(
            torch.float8_e8m0fnu
        )
    return codes.view(E4M3), torch.rand(grid, device="cuda") * 4e-4 + 1e-4


def rows(tokens, width):
    return torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)


def as_multiplied(x):
    """`x` in fp32 as the kernels have it."""
    if x.shape[0] <= WIDENED_TOKENS or not multiplies_e4m3(x.device):
        return x.float()
    values, factors = quantise_activations(x)
    return values.float() * factors.repeat_interleave(128, 1)[:, : x.shape[1]]


def product_of_tensor_cores(x, weight, scales):
    """cuBLASLt's e4m3 products of every 128 columns, added up in fp32: ours promote as often. Rounded to bf16."""
    values, factors = quantise_activations(x)
    outputs, width = weight.shape
    padding = (0, -width % 128, 0, -outputs % 16)
    wide = torch.nn.functional.pad(weight.view(torch.uint8), padding).view(E4M3)
    values = torch.nn.functional.pad(values.view(torch.uint8), padding[:2]).view(E4M3)
    by_row = scales.float().repeat_interleave(128, 0)[:outputs]
    one = torch.ones((), device="cuda")
    total = torch.zeros(x.shape[0], outputs, device="cuda")
    for group in range(factors.shape[1]):
        left, right = (m[:, 128 * group : 128 * (group + 1)].contiguous() for m in (values, wide))
        part = torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.float32, use_fast_accum=True)
        total += part[:, :outputs] * factors[:, group, None] * by_row[:, group]
    return total.bfloat16()


def relative_rms(got, expected):
    return ((got.float() - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(
    ("tokens", "width", "outputs"),
    [
        (1, 7168, 576),
        (2, 1536, 24576),
        (3, 7168, 576),
        (16, 7168, 1536),
        (17, 200, 130),
        (32, 16384, 7168),
        (33, 7168, 576),
        (63, 513, 577),
        (1000, 7168, 576),
        (4096, 512, 4096),
        (4097, 7168, 1536),
        (1, 18432, 7168),
    ],
)
def test_linear(tokens, width, outputs, ue8m0):
    weight, scales = matrix(outputs, width, ue8m0=ue8m0)
    memory = torch.full((tokens + 2, width + 8), float("nan"), device="cuda", dtype=torch.bfloat16)
    x = memory[1:-1, :width].copy_(rows(tokens, width))
    got = block_fp8_linear(x, weight, scales)
    exact = linear_reference(as_multiplied(x), weight, scales)
    if tokens > WIDENED_TOKENS and multiplies_e4m3(x.device):
        # What tensor cores drop of e4m3 products, and rounding.
        assert relative_rms(got, exact) <= 1.05 * relative_rms(product_of_tensor_cores(x, weight, scales), exact)
    else:
        assert relative_rms(got, exact) < 0.002
    assert torch.equal(got, block_fp8_linear(x, weight, scales))


def test_layers_of_one_input_behind_a_norm():
    matrices = [matrix(1536, 7168), matrix(576, 7168)]
    x, gain, base = rows(2, 7168), rows(1, 7168)[0], rows(2, 2112)
    got = block_fp8_vector_linear(x, [w for w, _ in matrices], [s for _, s in matrices], gain, 1e-6, base)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6) * gain.float()
    expected = torch.cat([linear_reference(normed, *m) for m in matrices], 1) + base.float()
    assert relative_rms(got, expected) < 0.004


def test_offsets_beyond_32_bits():
    weight, scales = matrix(18432, 128)
    x = torch.zeros(131_072, 128, device="cuda", dtype=torch.bfloat16)
    x[-40:] = rows(40, 128)
    got = block_fp8_linear(x, weight, scales)
    assert got.numel() > 2**31 and not got[:-40].any()
    assert relative_rms(got[-40:], linear_reference(as_multiplied(x[-40:]), weight, scales)) < 0.004


def test_no_rows():
    weight, scales = matrix(576, 7168)
    assert block_fp8_linear(rows(0, 7168), weight, scales).shape == (0, 576)
    gate_up, down = matrix(4, 512, 256), matrix(4, 256, 256)
    none = torch.zeros(0, 2, dtype=torch.int64, device="cuda")
    assert block_fp8_experts(rows(0, 256), none, none.float(), gate_up, down).shape == (0, 256)


@pytest.fixture(scope="module")
def experts():
    """V3.2's, whose stack is longer than 32 bits address."""
    gate_up, down = matrix(256, 4096, 7168), matrix(256, 7168, 2048)
    shared = matrix(2048, 7168), matrix(2048, 7168), matrix(7168, 2048)
    return gate_up, down, shared


@pytest.mark.parametrize("tokens", [1, 6, 7, 100, 1025, 3000])
def test_experts(experts, tokens):
    gate_up, down, shared = experts
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB")
    x, base = rows(tokens, 7168), rows(tokens, 7168)
    chosen = torch.rand(tokens, 256, device="cuda").topk(8).indices
    chosen[:, 0] = torch.where((chosen == 255).any(1), chosen[:, 0], 255)
    mix = torch.rand(tokens, 8, device="cuda") / 8
    got = block_fp8_experts(x, chosen, mix, gate_up, down, shared=shared, accumulate=base.clone())
    some = slice(max(0, tokens - 5), None)
    expected = block_fp8_experts_reference(x[some].float(), chosen[some], mix[some], gate_up, down, shared)
    # Quantised activations cost some percent; rounding in bf16 a tenth of one.
    narrow = tokens > WIDENED_TOKENS
    assert relative_rms(got[some], expected + base[some].float()) < (0.05 if narrow else 0.006)
    assert torch.equal(got, block_fp8_experts(x, chosen, mix, gate_up, down, shared=shared, accumulate=base.clone()))


def test_experts_that_nobody_chose_and_ragged_widths():
    gate_up, down = matrix(5, 2 * 128, 200), matrix(5, 200, 128)
    for tokens in (3, 40, 500):
        x = rows(tokens, 200)
        chosen = torch.tensor([[1, 4]], device="cuda").expand(tokens, -1).contiguous()
        mix = torch.rand(tokens, 2, device="cuda")
        expected = block_fp8_experts_reference(x.float(), chosen, mix, gate_up, down)
        assert relative_rms(block_fp8_experts(x, chosen, mix, gate_up, down), expected) < 0.05


@pytest.mark.parametrize("tokens", [1, 40])
def test_in_a_graph_and_compiled(tokens):
    (weight, scales), gate_up, down = matrix(576, 256), matrix(8, 512, 256), matrix(8, 256, 256)
    x, mix = rows(tokens, 256), torch.rand(tokens, 2, device="cuda")
    chosen = torch.rand(tokens, 8, device="cuda").topk(2).indices

    def run(x):
        return block_fp8_linear(block_fp8_experts(x, chosen, mix, gate_up, down), weight, scales)

    expected = run(x)
    assert torch.equal(torch.compile(run, fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    x.copy_(other := rows(tokens, 256))
    graph.replay()
    assert torch.equal(out, run(other))
