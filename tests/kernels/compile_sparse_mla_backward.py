"""Run by test_sparse_mla_backward_triton.py in a process of its own: compile default tiles for every architecture."""

import os
import re
import subprocess
import tempfile

import pytest
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from indexcache.kernels import sparse_mla_backward_triton as kernels
from indexcache.kernels.sparse_mla_backward_hopper_gluon import _sparse_mla_backward_hopper_kernel
from indexcache.kernels.sparse_mla_union_triton import owner_shift

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
POINTERS = {
    "q": "*bf16",
    "kv": "*bf16",
    "keys": "*i32",
    "counts": "*i32",
    "grad_out": "*bf16",
    "lse": "*fp32",
    "delta": "*fp32",
    "grad_q": "*bf16",
    "grad_kv": "*fp32",
}


def compile_kernel(function, arch, constants, source=ASTSource, **options):
    """Compile with every pointer and stride divisible by 16, as the production shapes have them."""
    constants = dict(constants)
    if constants["GROUP"] == 1:
        constants["counts"] = None
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTERS.get(name, "fp32" if name.startswith("scale") else "i32")
        if name in POINTERS or "stride" in name:
            attributes[(position,)] = [["tt.divisibility", 16]]
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return triton.compile(source(function, signature, constants, attributes), target=target, options=options)


def compile_backward(arch, heads, group=1, per_entry=False, tile=None):
    backend = "hip" if isinstance(arch, str) else "cuda"
    tile = tile or kernels.sparse_mla_backward_tile((backend, arch), group * heads, 576)
    constants = {
        "H": heads,
        "V": 512,
        "R": 64,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "HALF_V": 256,
        "BLOCK_R": 64,
        "BLOCK_K": 2048,
        "GROUP": group,
        "OWNER_SHIFT": owner_shift(group),
        "HEAD_BLOCKS": triton.cdiv(group * heads, tile.block_m),
        "PER_ENTRY": per_entry,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return compile_kernel(kernels._sparse_mla_bwd_kernel, arch, constants, **options)


def compile_hopper(heads, group=1, per_entry=False):
    constants = {
        "H": heads,
        "GROUP": group,
        "OWNER_SHIFT": owner_shift(group),
        "HEAD_BLOCKS": 1 if group > 1 else triton.cdiv(heads, 64),
        "BLOCK_K": triton.next_power_of_2(2048 * group),
        "PER_ENTRY": per_entry,
    }
    return compile_kernel(_sparse_mla_backward_hopper_kernel, 90, constants, GluonASTSource, num_warps=8)


def stack_bytes(compiled):
    """Local memory of a thread, from the compiled code's own resource table."""
    folder = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [os.path.join(folder, "cuobjdump"), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report).group(1))


@pytest.mark.parametrize("arch", SHARED_KB)
def test_default_tiles_fit_the_shared_memory(arch):
    compiled = compile_backward(arch, heads=20)
    assert compiled.metadata.shared <= SHARED_KB[arch] * 1024


@pytest.mark.parametrize(("heads", "group"), [(64, 1), (20, 3)])
def test_the_hopper_kernel_uses_its_instructions(heads, group):
    compiled = compile_hopper(heads, group)
    assert compiled.metadata.shared <= SHARED_KB[90] * 1024
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n64k16" in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx)
    assert "add.v2.f32" in ptx and not re.search(r"(atom|red)\.global[^;]*\.add\.f32", ptx)
