"""The kernels of sparse MLA's gradient compile for every architecture, within its shared memory."""

import re

import pytest
import torch

pytest.importorskip("triton")

from testing.compiled_kernels import SHARED_KB, compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource

from indexcache.kernels.common.device_target import TARGETS, DeviceTarget
from indexcache.kernels.common.dispatch import no_fallback
from indexcache.kernels.common.pretended_tensors import pretended_launches
from indexcache.kernels.sparse_mla import sparse_mla_backward_triton as kernels
from indexcache.kernels.sparse_mla.sparse_mla_backward_hopper_gluon import _sparse_mla_backward_hopper_kernel
from indexcache.kernels.sparse_mla.sparse_mla_union_triton import list_form

TYPES = {
    "scale": "fp32",
    "scale_log2": "fp32",
    "q": "*bf16",
    "kv": "*bf16",
    "keys": "*i32",
    "counts": "*i32",
    "grad_out": "*bf16",
    "lse": "*fp32",
    "delta": "*fp32",
    "grad_q": "*bf16",
    "grad_kv": "*fp32",
    **dict.fromkeys(("q_strides", "do_strides", "dq_strides"), ("i32",) * 3),
    **dict.fromkeys(("kv_strides", "keys_strides"), ("i32",) * 2),
}


def compile_backward(arch, heads, group=1, per_entry=False, tile=None):
    backend = "hip" if isinstance(arch, str) else "cuda"
    tile = tile or kernels.sparse_mla_backward_tile(DeviceTarget(backend, arch, 132), group * heads, 576)
    constants = {
        "V": 512,
        "R": 64,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "HALF_V": 256,
        "BLOCK_R": 64,
        "FORM": list_form(heads, group, tile.block_m, 2048),
        "PER_ENTRY": per_entry,
    }
    if group == 1:
        constants["counts"] = None
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return compile_kernel(kernels._sparse_mla_bwd_kernel, arch, constants, TYPES, **options)


def compile_hopper(heads, group=1, per_entry=False):
    constants = {"FORM": list_form(heads, group, 64, 2048 * group), "PER_ENTRY": per_entry}
    if group == 1:
        constants["counts"] = None
    return compile_kernel(_sparse_mla_backward_hopper_kernel, 90, constants, TYPES, GluonASTSource, num_warps=8)


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


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_hopper_launch_passes_what_the_kernel_takes(deterministic):
    launches = []
    B, S, H, K = 1, 3, 128, 16
    with pretended_launches(TARGETS["sm_90"], lambda *launch: launches.append(launch)), no_fallback() as ran:

        def new(*shape, dtype=torch.bfloat16):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        out, rows = new(B, S, H, 512), new(B, S, H, dtype=torch.float32)
        inputs = new(B, S, H, 576), new(B, 20, 576), new(B, S, K, dtype=torch.int32)
        kernels.sparse_mla_backward_triton(out, rows, *inputs, out, rows, 0.1, deterministic)
    assert ran == [("sparse_mla's gradient: kernels", "Gluon for Hopper")]
    ((grid, arguments, options),) = (
        launch for kernel, *launch in launches if kernel is _sparse_mla_backward_hopper_kernel
    )
    names = _sparse_mla_backward_hopper_kernel.arg_names
    given = dict(zip(names, arguments)) | {name: value for name, value in options.items() if name != "num_warps"}
    assert list(given) == names and grid == (S * 2,)
    assert given["PER_ENTRY"] == deterministic and given["FORM"].HEAD_BLOCKS == 2
    assert given["grad_kv"].shape == ((S, 2, K, 576) if deterministic else (B, 20, 576))
