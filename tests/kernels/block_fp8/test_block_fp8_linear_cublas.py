"""When cuBLASLt multiplies block fp8 weights, as told without a GPU; what it makes of them, on one."""

import pytest
import torch

pytest.importorskip("triton")

from indexcache.kernels.block_fp8 import block_fp8_linear as linear_module
from indexcache.kernels.block_fp8 import block_fp8_linear_cublas as cublas_module
from indexcache.kernels.block_fp8.block_fp8_format import E4M3, scale_grid
from indexcache.kernels.block_fp8.block_fp8_linear import block_fp8_linear
from indexcache.kernels.block_fp8.block_fp8_linear_cublas import block_fp8_linear_cublas, why_not_cublas
from indexcache.kernels.block_fp8.block_fp8_linear_triton import block_fp8_linear_triton
from indexcache.kernels.block_fp8.block_fp8_reference import quantised_linear_reference
from indexcache.kernels.common.device_target import TARGETS
from indexcache.kernels.common.dispatch import no_fallback
from indexcache.kernels.common.pretended_tensors import pretended_launches

GPU = torch.device("cuda", 0)


@pytest.fixture
def torch_scales_blocks(monkeypatch):
    monkeypatch.setattr(cublas_module, "why_no_block_scaling", lambda: None)


def explained(target="sm_90", tokens=33, width=512, outputs=384, dtype=torch.bfloat16, scales=torch.float32, start=0):
    """The backend that runs, and why not cuBLASLt."""
    with pretended_launches(TARGETS[target], lambda *_: None):
        x = torch.empty(tokens, width, dtype=dtype, device=GPU)
        weight = torch.empty(outputs + start, width, dtype=E4M3, device=GPU)[start:]
        grid = torch.empty(*scale_grid(outputs, width, (128, 128)), dtype=scales, device=GPU)
        name, reasons = linear_module._LINEAR.explain(GPU, x, weight, grid, (128, 128), None, None)
    return name, dict(reasons).pop("cuBLASLt", None)


@pytest.mark.usefixtures("torch_scales_blocks")
@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        (None, {}),
        (None, {"tokens": 4099}),
        ("it is for more than 32 tokens", {"tokens": 32}),
        ("it is for compute capability 9.0", {"target": "sm_80"}),
        ("it is for compute capability 9.0", {"target": "sm_100"}),
        ("it takes rows by 128 and columns by 512, and the weight has 576 x 512", {"outputs": 576}),
        ("it takes rows by 128 and columns by 512, and the weight has 384 x 256", {"width": 256}),
        ("it takes scales in fp32, and these are ue8m0", {"scales": torch.float8_e8m0fnu}),
        ("it makes bf16, not torch.float16", {"dtype": torch.float16}),
    ],
)
def test_every_reason_is_told(reason, changes):
    assert explained(**changes) == ("cuBLASLt" if reason is None else "Triton", reason)


@pytest.mark.parametrize(
    ("torch_version", "cuda_version", "reason"),
    [
        ("2.9.1+cu129", "12.9", "it needs torch 2.11 or newer, this is 2.9.1+cu129"),
        ("2.11.0+cu128", "12.8", "it needs CUDA 12.9 or newer, and this torch has 12.8"),
        ("2.11.0+cpu", None, "it needs CUDA 12.9 or newer, and this torch has None"),
        ("2.11.0+cu130", "13.0", None),
    ],
)
def test_a_torch_without_block_scaling_is_told(monkeypatch, torch_version, cuda_version, reason):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    cublas_module.why_no_block_scaling.cache_clear()
    try:
        assert explained() == ("cuBLASLt" if reason is None else "Triton", reason)
    finally:
        cublas_module.why_no_block_scaling.cache_clear()


def test_a_cpu_is_told():
    x, weight = torch.empty(33, 128, dtype=torch.bfloat16), torch.empty(128, 128, dtype=E4M3)
    assert why_not_cublas(x, weight, torch.ones(1, 1)) == "it needs a CUDA device, not cpu"


def relative_rms(got, exact):
    return ((got.double() - exact).square().mean() / exact.square().mean()).sqrt()


@pytest.fixture
def matrices():
    """Of rows and columns: e4m3 codes of both signs, and scales."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)

    def make(outputs, width):
        codes = torch.randint(0x20, 0x78, (outputs, width), dtype=torch.uint8, device="cuda")
        codes |= torch.randint(0, 2, codes.shape, dtype=torch.uint8, device="cuda") << 7
        return codes.view(E4M3), torch.rand(scale_grid(outputs, width, (128, 128)), device="cuda") * 4e-4 + 1e-4

    return make


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "width", "outputs"),
    [(33, 512, 128), (64, 1024, 256), (1001, 1536, 1024), (4096, 7168, 1536), (4098, 16384, 896), (131, 512, 24576)],
)
def test_products_are_as_exact_as_tritons(matrices, tokens, width, outputs):
    weight, scales = matrices(outputs, width)
    x = torch.randn(tokens, width + 8, device="cuda", dtype=torch.bfloat16)[:, :width]
    reason = why_not_cublas(x, weight, scales)
    if reason is not None:
        pytest.skip(reason)
    with no_fallback() as ran:
        got = block_fp8_linear(x, weight, scales)
    assert ran == [("block_fp8_linear", "cuBLASLt")]
    exact = quantised_linear_reference(x.double(), weight, scales)
    ours = block_fp8_linear_triton(x, weight, scales, None, None, True)
    assert got.shape == exact.shape and got.is_contiguous()
    assert relative_rms(got, exact) <= 1.1 * relative_rms(ours, exact) + 1e-4
    assert torch.equal(got, block_fp8_linear(x, weight, scales))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [36, 39])
def test_base_and_output(matrices, tokens):
    weight, scales = matrices(256, 512)
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    if reason := why_not_cublas(x, weight, scales):
        pytest.skip(reason)
    wide = torch.full((tokens, 288), 7.0, device="cuda", dtype=torch.bfloat16)
    out = wide[:, 16:272]
    out.copy_(before := torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16))
    plain = block_fp8_linear_cublas(x, weight, scales, None, None)
    assert block_fp8_linear(x, weight, scales, base=out, out=out) is out
    assert torch.equal(out, plain + before)
    assert (wide[:, :16] == 7).all() and (wide[:, 272:] == 7).all()
    bias = before[:1].expand(tokens, -1)
    assert torch.equal(block_fp8_linear(x, weight, scales, base=bias), plain + bias)
    assert block_fp8_linear(x, weight, scales, out=out) is out and torch.equal(out, plain)
