"""Run by test_block_fp8_triton.py in a process of its own: compile the block fp8 kernels for every architecture."""

import pytest
import triton.language as tl
from testing.compiled_kernels import SHARED_KB, compile_kernel, stack_bytes
from triton.experimental.gluon._runtime import GluonASTSource

from indexcache.kernels.block_fp8 import (
    block_fp8_activations_triton,
    block_fp8_experts_hopper_gluon,
    block_fp8_experts_pieces_triton,
    block_fp8_experts_triton,
    block_fp8_linear_triton,
    block_fp8_pieces_triton,
    block_fp8_vector_triton,
)

ARCHITECTURES = [arch for arch in SHARED_KB if isinstance(arch, int)]
ROOMY = (80, 90, 100)
# DeepSeek-V3.2.
HIDDEN, INNER, EXPERTS = 7168, 2048, 256


def types(arch, quantised=False, powers=False):
    """Of pointers: before compute capability 8.9 Triton knows no e4m3 and is given its bytes."""
    weight = "*fp8e4nv" if arch >= 89 else "*u8"
    rows = "*fp8e4nv" if quantised else "*bf16"
    return {
        **dict.fromkeys(("weight", "gate_up", "gate", "up", "down", "shared_down"), weight),
        **{f"weight{i}": weight for i in range(4)},
        **{f"scales{i}": "*u8" if powers else "*fp32" for i in range(4)},
        **dict.fromkeys(("scales", "gate_up_scales", "gate_scales", "up_scales"), "*u8" if powers else "*fp32"),
        **dict.fromkeys(("down_scales", "shared_scales"), "*u8" if powers else "*fp32"),
        **dict.fromkeys(("x", "hidden"), rows),
        **dict.fromkeys(("out", "base", "norm", "routed"), "*bf16"),
        **dict.fromkeys(("factors", "hidden_factors"), "*fp32" if quantised else rows),
        "weights": "*fp32",
        "experts": "*i64",
        **dict.fromkeys(("source", "tiles", "ends"), "*i32"),
        "eps": "fp32",
    }


def common(quantised, powers=False):
    return {"GROUP": 128, "QUANTISED": quantised, "POWERS": powers, "WHOLE": True}


def check(compiled, arch, stack=0):
    assert compiled.metadata.shared <= SHARED_KB[arch] * 1024
    assert stack_bytes(compiled) <= stack
    return compiled


def every_architecture(*cases):
    """Sizes, with quantised activations or without: only where the matrix units take e4m3."""
    return [(arch, *case) for arch in ARCHITECTURES for case in cases if arch >= 89 or not case[1]]


@pytest.mark.parametrize(
    ("arch", "tokens", "quantised"),
    every_architecture((8, False), (32, False), (4096, False), (64, True), (4096, True)),
)
def test_products_fit_and_use_the_matrix_units(arch, tokens, quantised):
    tiles = block_fp8_linear_triton.linear_tiles(tokens, quantised, arch in ROOMY)
    constants = dict(
        ROWS=tiles.rows, COLUMNS=tiles.columns, SWIZZLE=8, SPLITS=1, HAS_BASE=True, **common(quantised, tokens == 64)
    )
    compiled = compile_kernel(
        block_fp8_linear_triton.block_fp8_matmul_kernel,
        arch,
        constants,
        types(arch, quantised, tokens == 64),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    ptx = check(compiled, arch).asm["ptx"]
    if quantised:
        assert {90: "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", 100: "tcgen05.mma"}.get(
            arch, "e4m3"
        ) in ptx
    elif arch == 90 and tiles.rows >= 64:
        assert ".bf16.bf16" in ptx and "wgmma" in ptx


@pytest.mark.parametrize(
    ("arch", "pairs", "quantised"),
    every_architecture((64, False), (4096, False), (16384, False), (32768, True), (131072, True)),
)
def test_grouped_products_fit(arch, pairs, quantised):
    narrow = dict(zip(("up", "down"), block_fp8_experts_triton.expert_tiles(pairs, EXPERTS, quantised, arch in ROOMY)))
    for name, tiles in narrow.items():
        kernel = getattr(block_fp8_experts_triton, f"block_fp8_experts_{name}_kernel")
        constants = dict(ROWS=tiles.rows, COLUMNS=tiles.columns, E=EXPERTS, BAND=8, **common(quantised))
        if name == "up":
            constants["ROUND"] = tl.bfloat16
        options = dict(num_warps=tiles.warps, num_stages=tiles.stages)
        # Two sums of 128 x 128 and the product on its way: what does not fit is kept aside, at the end. Where weights
        # are widened without Hopper's products a register or two are.
        stack = 256 if (name, tiles.rows) == ("up", 128) else 32 if arch == 120 else 0
        check(compile_kernel(kernel, arch, constants, types(arch, quantised), **options), arch, stack)


VECTORS = {
    "linear": dict(D=HIDDEN, N0=1536, N1=576, N2=0, N3=0, HAS_NORM=True, HAS_BASE=False),
    "wide linear": dict(D=16384, N0=HIDDEN, N1=0, N2=0, N3=0, HAS_NORM=False, HAS_BASE=True),
    "up": dict(D=HIDDEN, INNER=INNER, SHARED=INNER, K=8),
    "down": dict(D=HIDDEN, INNER=INNER, SHARED=INNER, K=8, HAS_BASE=True),
}


def compile_vector(name, arch, early=0):
    kernel = {
        "up": block_fp8_vector_triton.block_fp8_experts_up_vector_kernel,
        "down": block_fp8_vector_triton.block_fp8_experts_down_vector_kernel,
    }.get(name, block_fp8_vector_triton.block_fp8_vector_kernel)
    constants = dict(VECTORS[name], POWERS=name == "up", EARLY=early)
    options = block_fp8_vector_triton.steps(INNER if name == "down" else constants["D"])
    warps = options.pop("num_warps")
    extra = {"launch_pdl": True} if early else {}
    return compile_kernel(
        kernel, arch, constants | options, types(arch, powers=name == "up"), num_warps=warps, **extra
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_change_places_between_threads_only_to_be_summed(name, arch):
    """Activations, weights and scales lie in the same threads: no step waits for the others of its program."""
    # Without conversion instructions bytes take registers: some are kept aside on sm86.
    ptx = check(compile_vector(name, arch), arch, stack=256 if arch == 86 else 0).asm["ptx"]
    sums = {"linear": 2, "wide linear": 1, "up": 2, "down": VECTORS["down"]["K"] + 1}[name]
    # There are seven and eight steps, and two an expert.
    assert ptx.count("bar.sync") <= 3 * sums + 2


@pytest.mark.parametrize("name", VECTORS)
def test_an_early_kernel_writes_nothing_before_it_has_waited(name):
    ptx = compile_vector(name, 90, early=1).asm["ptx"]
    assert 0 < ptx.index("griddepcontrol.wait") < ptx.index("st.global")
    assert "griddepcontrol" not in compile_vector(name, 90).asm["ptx"]


PIECES = {
    "linear": dict(D=HIDDEN, N0=1536, N1=576, N2=0, N3=0, HAS_NORM=True, HAS_BASE=False, SPLIT=True, ROWS=64),
    "wide linear": dict(D=16384, N0=HIDDEN, N1=0, N2=0, N3=0, HAS_NORM=False, HAS_BASE=True, SPLIT=False, ROWS=128),
    "up": dict(D=HIDDEN, INNER=INNER, SHARED=INNER, K=8),
    "down": dict(D=HIDDEN, INNER=INNER, SHARED=INNER, K=8),
}


def compile_pieces(name, early=0):
    expert = {"up": block_fp8_experts_pieces_triton.UP, "down": block_fp8_experts_pieces_triton.DOWN}
    constants = dict(PIECES[name], TOKENS=16, GROUP=128, POWERS=name == "down", EARLY=early)
    if name in expert:
        rows, warps, stages = expert[name]
        kernel = getattr(block_fp8_experts_pieces_triton, f"block_fp8_experts_{name}_pieces_kernel")
        constants["ROWS"] = rows
    else:
        kernel, warps, stages = block_fp8_pieces_triton.block_fp8_pieces_kernel, 4, 4
    named = {**types(90, powers=name == "down"), "out": "*fp32" if name == "linear" else "*bf16", "parts": "*fp32"}
    extra = {"launch_pdl": True} if early else {}
    return compile_kernel(kernel, 90, constants, named, num_warps=warps, num_stages=stages, **extra)


@pytest.mark.parametrize("name", PIECES)
def test_weights_in_pieces_go_to_the_matrix_units_as_they_are(name):
    compiled = check(compile_pieces(name), 90)
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3" in ptx
    # From memory to shared memory by 16 bytes, past the registers, several programs on a processor.
    assert "cp.async.cg.shared.global" in ptx
    # A scale's byte, and no weight's.
    assert ptx.count("ld.global.b8") <= 2
    assert compiled.metadata.shared <= 110 * 1024


@pytest.mark.parametrize("name", PIECES)
def test_pieces_write_nothing_before_they_have_waited(name):
    ptx = compile_pieces(name, early=1).asm["ptx"]
    assert 0 < ptx.index("griddepcontrol.wait") < ptx.index("st.global")


@pytest.mark.parametrize("gated", [True, False])
def test_grouped_products_for_hopper(gated):
    """Both groups of warps keep their sums in registers."""
    named = {"rows": "*fp8e4nv", "weight": "*fp8e4nv", "out": "*fp8e4nv" if gated else "*bf16", "scales": "*fp32"}
    named |= {"source": "*i32", "tiles": "*i32", "factors": "*fp32", "out_factors": "*fp32"}
    constants = dict(E=EXPERTS, BAND=8, GATED=gated, HAS_SOURCE=gated, POWERS=False)
    constants["ROUND"] = tl.bfloat16 if gated else tl.float32
    kernel = block_fp8_experts_hopper_gluon._grouped_product_kernel
    compiled = check(compile_kernel(kernel, 90, constants, named, source=GluonASTSource, num_warps=4), 90, stack=16)
    ptx = compiled.asm["ptx"]
    # Four steps of 32 columns, two blocks, two groups of warps.
    assert ptx.count("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3") == 16
    assert "cp.async.cg.shared.global" in ptx and "ld.global.b8" not in ptx


def test_sums_of_pieces_compile():
    named = {**types(90), "parts": "*fp32"}
    linear = dict(D=HIDDEN, SPLITS=16, BLOCK=512, HAS_NORM=True, HAS_BASE=True)
    check(compile_kernel(block_fp8_pieces_triton.sum_pieces_kernel, 90, linear, named, num_warps=4), 90)
    expert = dict(D=HIDDEN, K=8, HAS_SHARED=True, HAS_BASE=True, BLOCK=512)
    check(compile_kernel(block_fp8_experts_pieces_triton.sum_expert_parts_kernel, 90, expert, named, num_warps=4), 90)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_small_kernels_compile(arch):
    tiles = dict(E=EXPERTS, EP=EXPERTS, ROWS=64, TILES=block_fp8_experts_triton.TILES)
    check(compile_kernel(block_fp8_experts_triton.expert_tiles_kernel, arch, tiles, types(arch), num_warps=4), arch)
    parts = dict(SPLITS=4, BLOCK=1024, HAS_BASE=True)
    kernel = block_fp8_linear_triton.sum_parts_kernel
    check(compile_kernel(kernel, arch, parts, {**types(arch), "parts": "*fp32"}, num_warps=4), arch)
    if arch >= 89:
        kernel = block_fp8_activations_triton.quantise_activations_kernel
        named = {**types(arch), "values": "*fp8e4nv", "scales": "*fp32"}
        check(compile_kernel(kernel, arch, dict(ROWS=16, GROUP=128), named, num_warps=4), arch)
