"""Grouped products in Gluon on a Hopper GPU: as exact as the Triton kernels, for experts of any number of rows."""

import pytest
import torch

pytest.importorskip("triton")

from indexcache.kernels.block_fp8.block_fp8_activations_triton import quantise_activations_triton
from indexcache.kernels.block_fp8.block_fp8_experts import block_fp8_experts
from indexcache.kernels.block_fp8.block_fp8_experts_hopper_gluon import hopper_takes
from indexcache.kernels.block_fp8.block_fp8_experts_triton import grouped_experts
from indexcache.kernels.block_fp8.block_fp8_format import E4M3, scale_grid
from indexcache.kernels.common.device_target import device_target
from indexcache.kernels.common.dispatch import no_fallback
from indexcache.kernels.experts.routed_experts import group_by_expert

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _hopper():
    if device_target(torch.device("cuda", 0)).arch != 90:
        pytest.skip("needs compute capability 9.0")
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


def matrix(*shape, ue8m0=False):
    """Codes of both signs, and scales."""
    codes = torch.randint(0x20, 0x78, shape, dtype=torch.uint8) | torch.randint(0, 2, shape, dtype=torch.uint8) << 7
    grid = (*shape[:-2], *scale_grid(*shape[-2:], (128, 128)))
    if ue8m0:
        return codes.view(E4M3), torch.randint(113, 117, grid, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return codes.view(E4M3), torch.rand(grid) * 4e-4 + 1e-4


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "experts", "width", "inner", "k"),
    [
        (1, 3, 128, 128, 2),
        (300, 4, 384, 256, 2),
        (1000, 5, 640, 128, 3),
        (129, 1, 256, 384, 1),
        (2000, 40, 2048, 512, 8),
    ],
)
def test_products_are_what_triton_makes(tokens, experts, width, inner, k, dtype, ue8m0):
    gate_up, down = matrix(experts, 2 * inner, width, ue8m0=ue8m0), matrix(experts, width, inner, ue8m0=ue8m0)
    assert hopper_takes(width, inner, gate_up[0], down[0])
    x = torch.randn(tokens, width, dtype=dtype)
    # The first expert has most rows, and the last one none where there are several.
    likely = torch.arange(experts, 0, -1, dtype=torch.float32) - float(experts > k)
    chosen = torch.multinomial(likely.expand(tokens, -1) + 1e-9, k)
    place, ends = group_by_expert(chosen, experts, tokens)
    activations = quantise_activations_triton(x)
    got, ours = (
        grouped_experts(x, activations, place, ends[0], gate_up, down, hopper=hopper) for hopper in (True, False)
    )
    apart = ((got.double() - ours.double()).square().mean() / ours.double().square().mean()).sqrt()
    # Rounded before they are quantised again, few entries in between become the next e4m3 number.
    assert got.isfinite().all() and apart < 0.01
    again = grouped_experts(x, activations, place, ends[0], gate_up, down, hopper=True)
    assert torch.equal(got, again)


def test_it_runs_where_experts_have_many_tokens():
    gate_up, down, shared = (
        matrix(4, 512, 512),
        matrix(4, 512, 256),
        (matrix(256, 512), matrix(256, 512), matrix(512, 256)),
    )
    x = torch.randn(500, 512, dtype=torch.bfloat16)
    chosen, mix = torch.rand(500, 4).topk(2).indices, torch.rand(500, 2)
    with no_fallback() as ran:
        block_fp8_experts(x, chosen, mix, gate_up, down, shared=shared)
        block_fp8_experts(x[:40], chosen[:40], mix[:40], gate_up, down, shared=shared)
    of_experts = [entry for entry in ran if entry[0] == "block_fp8_experts"]
    assert of_experts == [("block_fp8_experts", "Gluon for Hopper"), ("block_fp8_experts", "Triton")]
