"""The lightning indexer's Triton kernels compile for every architecture, without a GPU, within its shared memory."""

import pytest
import torch

triton = pytest.importorskip("triton")

from testing.compiled_kernels import compile_kernel, stack_bytes  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from indexcache.kernels.lightning_indexer import indexer_quantization_triton as quantization  # noqa: E402
from indexcache.kernels.lightning_indexer import lightning_indexer_decode_triton as decode  # noqa: E402
from indexcache.kernels.lightning_indexer import lightning_indexer_hopper_gluon as hopper  # noqa: E402
from indexcache.kernels.lightning_indexer import lightning_indexer_triton as prefill  # noqa: E402

# Shared memory a program may use, in KB.
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 163),
    "sm86": (GPUTarget("cuda", 86, 32), 99),
    "sm89": (GPUTarget("cuda", 89, 32), 99),
    "sm90": (GPUTarget("cuda", 90, 32), 227),
    "sm100": (GPUTarget("cuda", 100, 32), 227),
    "sm120": (GPUTarget("cuda", 120, 32), 99),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
POINTERS = {
    "q": "*bf16",
    "k": "*bf16",
    "weights": "*fp32",
    "k_scale": "*fp32",
    "starts": "*i64",
    "first_keys": "*i32",
    "mask": "*u8",
    "redo": "*i32",
    "out": "*i32",
    "buffer": "*fp32",
    "exchange": "*i32",
    "lists": "*i64",
    "scores": "*fp32",
    "passed": "*i32",
    "counts": "*i32",
    "guesses": "*fp32",
}
STRIDES = {"q_strides": 3, "k_strides": 2}


def compiled(kernel, target, warps, **constants):
    if "EARLY" in kernel.arg_names:
        constants = {"EARLY": 0, **constants}
    types = {name: POINTERS.get(name, "fp32" if name == "scale" else "i32") for name in kernel.arg_names}
    types |= {name: ("i32",) * number for name, number in STRIDES.items() if name in types}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    places = [(i,) for i, name in enumerate(kernel.arg_names) if name in POINTERS and name not in constants]
    places += [(kernel.arg_names.index(name), i) for name in STRIDES if name in types for i in range(STRIDES[name])]
    aligned = {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 3})


def prefill_constants(H, D, architecture, topk=2048, masked=True):
    config = prefill.prefill_config(H, D, architecture)
    epoch = 32 * config["BK"]
    shapes = {"H": H, "D": D, "EPOCH": epoch, "CAP": prefill.list_capacity(topk, epoch)}
    # Rows are selected again only after the Hopper kernel.
    shapes |= {"HAS_FIRST": masked, "HAS_MASK": masked, "HAS_REDO": architecture == 90}
    shapes |= {} if masked else {"first_keys": None, "mask": None}
    shapes |= {} if architecture == 90 else {"redo": None}
    return shapes | {name: config[name] for name in ("HP", "DP", "BQ", "BK", "STAGES", "PARTS")}, config["num_warps"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("sm80", "sm90") else pytest.mark.slow) for name in TARGETS]
)
def test_prefill_compiles(name):
    target, limit = TARGETS[name]
    architecture = target.arch if target.backend == "cuda" else 0
    constants, warps = prefill_constants(32, 128, architecture)
    kernel = compiled(prefill.lightning_indexer_prefill_kernel, target, warps, **constants)
    assert kernel.metadata.shared <= limit * 1024


@pytest.mark.parametrize(
    "name, H, masked",
    [
        ("sm80", 32, False),
        ("sm90", 32, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("sm80", 64, False), ("sm80", 32, True), ("sm90", 20, False), ("sm90", 32, True)]
        ),
    ],
)
def test_prefill_does_not_spill(name, H, masked):
    target, _ = TARGETS[name]
    constants, warps = prefill_constants(H, 128, target.arch, masked=masked)
    kernel = compiled(prefill.lightning_indexer_prefill_kernel, target, warps, **constants)
    assert stack_bytes(kernel) == 0


@pytest.mark.parametrize("name", ["sm90", "sm86", "gfx942"])
def test_decode_compiles(name):
    target, limit = TARGETS[name]
    config = decode.score_config(1, 32, 128)
    warps = config.pop("num_warps")
    kernels = (
        compiled(decode.indexer_scores_kernel, target, warps, H=32, D=128, HAS_FIRST=True, HAS_MASK=True, **config),
        compiled(decode.indexer_filter_kernel, target, 4, SAMPLE=decode.SAMPLE, PIECE=decode.PIECE_KEYS, CAP=8192),
        compiled(decode.indexer_select_kernel, target, 8, PIECES=128, PIECE=decode.PIECE_KEYS, EPOCH=2048, CAP=8192),
    )
    assert all(kernel.metadata.shared <= limit * 1024 for kernel in kernels)
    assert name != "sm90" or all(stack_bytes(kernel) == 0 for kernel in kernels)


@pytest.mark.parametrize("architecture", [89, 90])
def test_quantisation_compiles_where_e4m3_is_in_hardware(architecture):
    types = {"x": "*bf16", "values": "*fp8e4nv", "scale": "*fp32", "norm": "fp32"}
    constants = {"D": 128, "ROWS": quantization.ROWS}
    kernel = compile_kernel(quantization.quantize_rows_kernel, architecture, constants, types, num_warps=4)
    assert "cvt.rn.satfinite.e4m3x2.f32" in kernel.asm["ptx"] and stack_bytes(kernel) == 0


@pytest.mark.slow
@pytest.mark.parametrize("H, D", [(1, 64), (7, 96), (64, 256), (64, 128)])
def test_other_shapes_compile_for_sm90(H, D):
    target, limit = TARGETS["sm90"]
    constants, warps = prefill_constants(H, D, 90)
    kernel = compiled(prefill.lightning_indexer_prefill_kernel, target, warps, **constants)
    assert kernel.metadata.shared <= limit * 1024


def hopper_compiled(H, D, dtype="bf16", sampling=False, masked=False):
    kernel, fp8 = hopper.lightning_indexer_hopper_kernel, dtype.startswith("fp8")
    form = hopper.kernel_form(H, 1 if fp8 else 2, sampling, first=masked, mask=masked, scale=fp8, guess=True)
    constants = {"FORM": form}
    constants |= {} if masked else {"first_keys": None, "mask": None}
    constants |= {} if fp8 else {"k_scale": None}
    element = gl.float8e4nv if fp8 else gl.bfloat16
    blocks = {"q_desc": [H, hopper.COLUMNS // H, D], "k_desc": [hopper.TILE_KEYS, D]}
    types = POINTERS | {"lists": "*i32"}
    types |= {
        name: f"tensordesc<{dtype}{block},{gl.NVMMASharedLayout.get_default_for(block, element)!r}>"
        for name, block in blocks.items()
    }
    return compile_kernel(kernel, 90, constants, types, GluonASTSource, num_warps=4)


@pytest.mark.parametrize(
    "H, D, dtype, sampling, masked, spilled",
    [
        (32, 128, "bf16", False, False, 0),
        (32, 128, "bf16", True, False, 0),
        (32, 128, "fp8e4nv", False, False, 0),
        (64, 128, "bf16", False, False, 0),
        pytest.param(64, 128, "bf16", False, True, 0, marks=pytest.mark.slow),
        # With Triton 3.9 (not 3.6) numbers of a thread that it needs once a launch.
        pytest.param(64, 128, "fp8e4nv", False, False, 16, marks=pytest.mark.slow),
        pytest.param(32, 128, "bf16", False, True, 8, marks=pytest.mark.slow),
        pytest.param(16, 64, "bf16", False, True, 0, marks=pytest.mark.slow),
        pytest.param(16, 64, "bf16", True, True, 0, marks=pytest.mark.slow),
        pytest.param(32, 128, "fp8e4nv", True, False, 0, marks=pytest.mark.slow),
    ],
)
def test_the_hopper_kernel_fits_does_not_spill_and_uses_its_instructions(H, D, dtype, sampling, masked, spilled):
    kernel = hopper_compiled(H, D, dtype, sampling, masked)
    assert kernel.metadata.shared <= TARGETS["sm90"][1] * 1024
    assert stack_bytes(kernel) <= spilled
    ptx = kernel.asm["ptx"]
    product = "m64n256k32.f32.e4m3" if dtype == "fp8e4nv" else "m64n256k16.f32.bf16"
    assert f"wgmma.mma_async.sync.aligned.{product}" in ptx and "cp.async.bulk.tensor.2d" in ptx
    assert "cp.async.bulk.tensor.3d" in ptx  # queries, heads outermost


def test_the_hopper_kernel_takes_only_what_fits_its_lists():
    """A list that was just cut holds topk and an eighth at most, and takes CHECK_TILES tiles until the next look."""
    q, k = torch.empty(1, 8, 32, 128, dtype=torch.bfloat16), torch.empty(1, 64, 128, dtype=torch.bfloat16)
    room = hopper.LIST_KEYS - hopper.CHECK_TILES * hopper.TILE_KEYS
    assert hopper.hopper_supports(q, k, prefill.MAX_TOPK)
    largest = max(topk for topk in range(room + 1) if hopper.hopper_supports(q, k, topk))
    assert largest + largest // 8 <= room < largest + 1 + (largest + 1) // 8


@pytest.mark.parametrize("guessed", [False, True])
def test_the_selection_from_lists_does_not_spill(guessed):
    constants = {
        "BQ": 8,
        "CAPACITY": hopper.LIST_KEYS,
        "ROW": 2 * hopper.LIST_KEYS + hopper.LIST_EXTRA,
        "HAS_GUESS": guessed,
    }
    kernel = compile_kernel(
        hopper.finish_rows_kernel, 90, constants, POINTERS | {"lists": "*i32"}, GluonASTSource, num_warps=4
    )
    assert stack_bytes(kernel) == 0
