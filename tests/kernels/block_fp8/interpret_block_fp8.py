"""Run by test_block_fp8_triton.py in a process of its own, with TRITON_INTERPRET=1; on a GPU by its test, without.

Every kernel is compared with its meaning in fp64, and may err twice as much as PyTorch in the same precision does.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from testing.interpreter_fp8 import convert_e4m3_by_pytorch

from indexcache.kernels.block_fp8 import block_fp8_activations_triton as activations_module
from indexcache.kernels.block_fp8 import block_fp8_experts as experts_module
from indexcache.kernels.block_fp8 import block_fp8_linear as linear_module
from indexcache.kernels.block_fp8.block_fp8_activations_triton import quantise_activations_triton
from indexcache.kernels.block_fp8.block_fp8_experts_pieces_triton import experts_in_pieces
from indexcache.kernels.block_fp8.block_fp8_experts_triton import tile_map
from indexcache.kernels.block_fp8.block_fp8_format import dequantise, quantise_weight
from indexcache.kernels.block_fp8.block_fp8_linear_triton import block_fp8_linear_triton
from indexcache.kernels.block_fp8.block_fp8_pieces_triton import linear_in_pieces, split_count, tile_rows
from indexcache.kernels.block_fp8.block_fp8_reference import (
    linear_reference,
    quantise_activations,
    quantised_linear_reference,
)
from indexcache.kernels.block_fp8.block_fp8_vector_triton import (
    block_fp8_experts_vector,
    block_fp8_vector_linear_triton,
)
from indexcache.kernels.common.dispatch import no_fallback
from indexcache.kernels.experts.routed_experts import group_by_expert
from indexcache.kernels.norm_rope_linear.rms_norm import rms_norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# bf16 products are wrong in Triton's interpreter (3.9); fp16 has the same code path.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
torch.set_default_device("cpu" if INTERPRETED else "cuda")
if INTERPRETED:
    convert_e4m3_by_pytorch()


@pytest.fixture(autouse=True)
def _strict():
    torch.manual_seed(0)
    with no_fallback():
        yield


def assert_as_exact_as(got, plain, exact):
    assert got.dtype == plain.dtype and got.shape == exact.shape and torch.isfinite(got).all()
    error, allowed = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * allowed + 2e-4 * exact.abs().max(), f"{error} against {allowed} of PyTorch"


def weight_of(rows, columns, ue8m0=False):
    return quantise_weight(0.1 * torch.randn(rows, columns), ue8m0=ue8m0)


def rows_of(tokens, width):
    """Rows with something between them, of very different sizes."""
    return torch.randn(tokens, width + 8, dtype=DTYPE)[:, :width] * (1 + 10 * torch.rand(tokens, 1, dtype=DTYPE))


@pytest.mark.parametrize(("tokens", "width"), [(37, 200), (1, 128), (130, 1100), (0, 128)])
def test_activations_to_the_bit(tokens, width):
    x = rows_of(tokens, width)
    if tokens > 1:
        x[1, 128:] = 0
    values, factors = quantise_activations_triton(x)
    expected, scales = quantise_activations(x)
    assert torch.equal(values.float(), expected.float()) and torch.equal(factors, scales)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(("tokens", "width", "outputs"), [(3, 200, 130), (70, 256, 300), (1, 128, 64), (33, 2200, 40)])
def test_products(tokens, width, outputs, quantised, ue8m0):
    x, (weight, scales) = rows_of(tokens, width), weight_of(outputs, width, ue8m0)
    meaning = quantised_linear_reference if quantised else linear_reference
    exact = meaning(x.double(), weight, scales)
    assert_as_exact_as(
        block_fp8_linear_triton(x, weight, scales, None, None, quantised), meaning(x, weight, scales), exact
    )


@pytest.mark.parametrize(("tokens", "width"), [(3, 200), (3, 2200), (70, 200)])
def test_base_is_added_in_place_and_beside(tokens, width):
    """Whether one program makes an output or several share it."""
    x, (weight, scales) = rows_of(tokens, width), weight_of(136, width)
    wide = torch.full((tokens, 160), 7.0, dtype=DTYPE)
    out = wide[:, 8:144]
    out.copy_(before := torch.randn(tokens, 136, dtype=DTYPE))
    quantised = tokens > 32
    plain = block_fp8_linear_triton(x, weight, scales, None, None, quantised)
    assert block_fp8_linear_triton(x, weight, scales, out, out, quantised) is out
    torch.testing.assert_close(out, plain + before, rtol=1e-2, atol=1e-2)
    assert (wide[:, :8] == 7).all() and (wide[:, 144:] == 7).all()
    bias = before[:1].expand(tokens, -1)
    torch.testing.assert_close(
        block_fp8_linear_triton(x, weight, scales, bias, None, quantised), plain + bias, rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(("widths", "norm"), [((130, 70), True), ((576,), False), ((8, 3, 200, 129), True)])
@pytest.mark.parametrize("width", [200, 1300])
def test_vectors(width, widths, norm, ue8m0):
    x = rows_of(2, width)
    matrices = [weight_of(rows, width, ue8m0) for rows in widths]
    weights, scales = [weight for weight, _ in matrices], [grid for _, grid in matrices]
    gain = torch.rand(width, dtype=DTYPE) if norm else None
    base = torch.randn(2, sum(widths), dtype=DTYPE)

    def plain(dtype):
        rows = x.to(dtype)
        if gain is not None:
            rows = rms_norm(rows, gain.to(dtype), 1e-6, allow_triton=False)
        return base.to(dtype) + torch.cat([linear_reference(rows, *matrix) for matrix in matrices], 1)

    got = block_fp8_vector_linear_triton(x, weights, scales, gain, 1e-6, base)
    assert_as_exact_as(got, plain(DTYPE), plain(torch.float64))


def as_bf16(x):
    """What pieces are exact for, in the dtype of these tests."""
    return x.bfloat16().to(DTYPE)


@pytest.mark.parametrize("splits", [1, 2, 3, None])
@pytest.mark.parametrize(("widths", "norm"), [((130, 70), True), ((576,), False), ((8, 3, 200, 129), True)])
@pytest.mark.parametrize(("tokens", "width"), [(1, 200), (3, 1300), (16, 512)])
def test_vectors_in_pieces(tokens, width, widths, norm, splits):
    x = as_bf16(rows_of(tokens, width))
    matrices = [weight_of(rows, width, tokens == 3) for rows in widths]
    weights, scales = [weight for weight, _ in matrices], [grid for _, grid in matrices]
    gain = torch.rand(width, dtype=DTYPE) if norm else None
    base = torch.randn(tokens, sum(widths), dtype=DTYPE)

    def plain(dtype):
        rows = x.to(dtype)
        if gain is not None:
            rows = rms_norm(rows, gain.to(dtype), 1e-6, allow_triton=False)
        return base.to(dtype) + torch.cat([linear_reference(rows, *matrix) for matrix in matrices], 1)

    got = linear_in_pieces(x, weights, scales, gain, 1e-6, base, splits=splits)
    # With a norm's weight the rows have more bits than two pieces.
    assert_as_exact_as(got, plain(torch.bfloat16 if norm else DTYPE).to(DTYPE), plain(torch.float64))


def test_pieces_of_all_sizes_of_bf16():
    """Entries down to 2^-17 of the largest of their 128 are exact, and what is no number stays none."""
    exponents = torch.arange(128, dtype=torch.float32) / 10
    x = as_bf16((-1) ** torch.arange(128) * 2.0**-exponents)[None] * torch.tensor(
        [[1.0], [2.0**-10], [0.0]], dtype=DTYPE
    )
    weight, scales = weight_of(64, 128)
    got, exact = linear_in_pieces(x, [weight], [scales]), linear_reference(x.double(), weight, scales)
    assert_as_exact_as(got, linear_reference(x, weight, scales), exact)
    assert not got[2].any()
    x[1, 5] = float("nan")
    got = linear_in_pieces(x, [weight], [scales])
    assert got[1].isnan().all() and torch.isfinite(got[0]).all()


def test_programs_share_the_columns_of_few_rows():
    """H200, DeepSeek-V3.2: q_a_proj alone and with kv_a_proj, o_proj, a dense layer's gate, q_b_proj, kv_b_proj."""
    chosen = {}
    for outputs, width in ((1536, 7168), (2112, 7168), (7168, 16384), (18432, 7168), (24576, 1536), (32768, 512)):
        rows = tile_rows(outputs, width)
        chosen[outputs] = rows, split_count(-(-outputs // rows), width // 128, 132)
    assert chosen == {1536: (64, 16), 2112: (64, 8), 7168: (128, 4), 18432: (128, 4), 24576: (64, 1), 32768: (64, 1)}


@pytest.mark.parametrize("tokens", [2, 40])
def test_bytes_mean_what_e4m3_does(tokens, monkeypatch):
    """What GPUs without such a dtype are given: every code, subnormal numbers and NaN included."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = torch.where((codes & 0x7F) == 0x7F, 0, codes)
    weight = torch.stack([codes, codes.flip(0), finite, finite.roll(77)]).view(torch.float8_e4m3fn)
    scales, x = torch.rand(1, 2), torch.randn(tokens, 256, dtype=DTYPE)

    def run():
        if tokens == 2:
            return block_fp8_vector_linear_triton(x, [weight], [scales])
        return block_fp8_linear_triton(x, weight, scales, None, None, False)

    expected = run()
    assert expected[:, :2].isnan().all() and torch.isfinite(expected[:, 2:]).all()
    monkeypatch.setattr(activations_module, "reads_e4m3", lambda tensor: False)
    assert torch.equal(run()[:, 2:], expected[:, 2:]) and run()[:, :2].isnan().all()


@pytest.mark.parametrize("rows", [16, 64])
def test_tiles_hold_rows_of_one_expert(rows):
    counts = torch.tensor([3, 0, 67, 0, 1, 4, 0])
    ends = counts.cumsum(0).int()
    tiles, most = tile_map(ends, 75, rows)
    seen = [[] for _ in counts]
    for expert, first, last in tiles.t().tolist():
        if expert < len(counts):
            assert last == ends[expert]
            seen[expert] += range(first, min(first + rows, last))
    assert [row for part in seen for row in part] == list(range(75)) and most == tiles.shape[1]
    assert [len(part) for part in seen] == counts.tolist()


def experts_of(count, inner, width, ue8m0):
    halves = [[weight_of(inner, width, ue8m0) for _ in range(2)] for _ in range(count)]
    downs = [weight_of(width, inner, ue8m0) for _ in range(count)]
    gate_up = tuple(torch.stack([torch.cat([half[i] for half in pair]) for pair in halves]) for i in range(2))
    return gate_up, tuple(torch.stack([down[i] for down in downs]) for i in range(2))


def experts_meaning(x, experts, weights, gate_up, down, shared, base, routed_narrow, shared_narrow, dtype):
    """In `dtype`, rounded to DTYPE where the kernels round; of quantised activations where they are."""

    def linear(rows, matrix, narrow):
        if narrow:
            values, factors = quantise_activations(rows.to(DTYPE))
            rows = values.to(dtype) * factors.to(dtype).repeat_interleave(128, 1)[:, : rows.shape[1]]
        return F.linear(rows.to(dtype), dequantise(*matrix, dtype=dtype)).to(DTYPE if narrow else dtype)

    def expert(rows, gate, up, down, narrow):
        hidden = F.silu(linear(rows, gate, narrow)) * linear(rows, up, narrow)
        return linear(hidden, down, narrow).to(dtype)

    out = base.to(dtype, copy=True)
    for token in range(x.shape[0]):
        for j, index in enumerate(experts[token].tolist()):
            gate, up = zip(gate_up[0][index].chunk(2), gate_up[1][index].chunk(2))
            row = expert(x[token : token + 1], gate, up, (down[0][index], down[1][index]), routed_narrow)
            out[token] += (row[0] * weights[token, j].to(dtype)).to(dtype)
    return out if shared is None else out + expert(x, *shared, shared_narrow)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(("tokens", "count", "k"), [(3, 5, 2), (9, 5, 2), (40, 5, 2), (70, 2, 2)])
def test_experts(tokens, count, k, ue8m0, monkeypatch):
    """Matrix-vector kernels; grouped with widened weights, then the shared expert's rows quantised, then all rows."""
    width, inner, shared_inner = 200, 136, 150
    gate_up, down = experts_of(count, inner, width, ue8m0)
    shared = tuple(weight_of(*shape, ue8m0) for shape in ((150, width), (150, width), (width, shared_inner)))
    x = rows_of(tokens, width).contiguous()
    experts = torch.stack([torch.randperm(count)[:k] for _ in range(tokens)])
    weights, base = torch.rand(tokens, k), torch.randn(tokens, width, dtype=DTYPE)
    narrow = tokens * k > 32 * count, tokens > 32
    given = (x, experts, weights, gate_up, down, shared, base, *narrow)
    exact, plain = experts_meaning(*given, torch.float64), experts_meaning(*given, DTYPE)
    got = base.clone()
    if tokens == 3:
        block_fp8_experts_vector(x, experts, weights, gate_up, down, shared, got, got)
        alone = block_fp8_experts_vector(x, experts, weights, gate_up, down, None, None)
    else:
        # Blocks of some tokens, the last one shorter, where all are widened anyway.
        if tokens == 9:
            monkeypatch.setattr(experts_module, "BLOCK_BYTES", 4 * 2 * k * (width + inner))
        experts_module.experts_by_group(x, experts, weights, gate_up, down, shared, got, got)
        alone = torch.empty_like(x)
        experts_module.experts_by_group(x, experts, weights, gate_up, down, None, None, alone)
    assert_as_exact_as(got, plain, exact)
    given = (*given[:5], None, torch.zeros_like(base), *narrow)
    exact, plain = experts_meaning(*given, torch.float64), experts_meaning(*given, DTYPE)
    assert_as_exact_as(alone, plain, exact)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 200, 136), (4, 256, 128)])
def test_experts_in_pieces(tokens, width, inner, ue8m0):
    gate_up, down = experts_of(5, inner, width, ue8m0)
    shared = tuple(weight_of(*shape, ue8m0) for shape in ((150, width), (150, width), (width, 150)))
    x = as_bf16(rows_of(tokens, width))
    experts = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])
    weights, base = torch.rand(tokens, 2), torch.randn(tokens, width, dtype=DTYPE)
    for always, before in ((shared, base), (None, torch.zeros_like(base))):
        given = (x, experts, weights, gate_up, down, always, before, False, False)
        exact, plain = experts_meaning(*given, torch.float64), experts_meaning(*given, torch.bfloat16).to(DTYPE)
        got = before.clone()
        assert experts_in_pieces(x, experts, weights, gate_up, down, always, got, got) is got
        assert_as_exact_as(got, plain, exact)


def test_no_rows_launch_nothing():
    weight, scales = weight_of(64, 128)
    assert block_fp8_linear_triton(rows_of(0, 128), weight, scales, None, None, False).shape == (0, 64)
    gate_up, down = experts_of(2, 24, 128, False)
    empty = torch.zeros(0, 2, dtype=torch.int64)
    place, ends = group_by_expert(empty, 2, 1)
    assert place.shape == (0, 2) and ends.shape[1] == 2
    got = block_fp8_experts_vector(rows_of(0, 128), empty, torch.rand(0, 2), gate_up, down, None, None)
    assert got.shape == (0, 128)
    got = experts_in_pieces(rows_of(0, 128), empty, torch.rand(0, 2), gate_up, down, None, None)
    assert got.shape == (0, 128)
    assert linear_in_pieces(rows_of(0, 128), [weight], [scales]).shape == (0, 64)


def test_public_operations_run_the_kernels():
    weight, scales = weight_of(64, 128)
    for tokens in (1, 5, 40):
        x = rows_of(tokens, 128)
        got = linear_module.block_fp8_linear(x, weight, scales)
        meaning = quantised_linear_reference if tokens > linear_module.WIDENED_TOKENS else linear_reference
        assert_as_exact_as(got, meaning(x, weight, scales), meaning(x.double(), weight, scales))
    with pytest.raises(RuntimeError, match="blocks are 64 x 64, and kernels take 128 x 128"):
        linear_module.block_fp8_linear(x, *quantise_weight(torch.randn(64, 128), (64, 64)), block_size=(64, 64))
