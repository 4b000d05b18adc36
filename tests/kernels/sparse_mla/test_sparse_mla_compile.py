"""Sparse MLA's kernels compile for every architecture, within its shared memory and without spills."""

import re

import pytest

pytest.importorskip("triton")

import triton
from testing.compiled_kernels import SHARED_KB, compile_kernel, stack_bytes
from triton.experimental.gluon._runtime import GluonASTSource

from indexcache.kernels.common.device_target import DeviceTarget
from indexcache.kernels.sparse_mla import sparse_mla_triton as kernels
from indexcache.kernels.sparse_mla.sparse_mla_hopper_gluon import _sparse_mla_hopper_kernel
from indexcache.kernels.sparse_mla.sparse_mla_union_triton import _merge_key_lists_kernel, list_form, owner_shift

TYPES = {
    "q": "*bf16",
    "kv": "*bf16",
    "keys": "*i32",
    "counts": "*i32",
    "out": "*bf16",
    "lse": "*fp32",
    "scale_log2": "fp32",
    **dict.fromkeys(("kv_strides", "keys_strides"), ("i32",) * 2),
    "q_strides": ("i32",) * 3,
}


def compile_forward(arch, heads, splits, value_dim=512, rope_dim=64, group=1):
    backend = "hip" if isinstance(arch, str) else "cuda"
    tile = kernels.sparse_mla_tile(DeviceTarget(backend, arch, 132), group * heads, value_dim + rope_dim)
    constants = {
        "V": value_dim,
        "R": rope_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_V": triton.next_power_of_2(value_dim),
        "BLOCK_R": max(16, triton.next_power_of_2(rope_dim)),
        "FORM": list_form(heads, group, tile.block_m, 2048),
        "SPLIT": splits > 1,
    }
    types = TYPES | {"out_strides": ("i32",) * 4} | ({"out": "*fp32"} if splits > 1 else {})
    if group == 1:
        constants["counts"] = None
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return compile_kernel(kernels._sparse_mla_fwd_kernel, arch, constants, types, **options)


@pytest.mark.parametrize("arch", SHARED_KB)
def test_default_tiles_fit_the_shared_memory(arch):
    compiled = compile_forward(arch, heads=20, splits=1)
    assert compiled.metadata.shared <= SHARED_KB[arch] * 1024


@pytest.mark.parametrize(("arch", "heads", "splits"), [(80, 20, 1), (80, 16, 32), (80, 64, 1), (90, 16, 32)])
def test_default_tiles_do_not_spill_and_copy_asynchronously(arch, heads, splits):
    compiled = compile_forward(arch, heads, splits)
    assert stack_bytes(compiled) == 0
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", compiled.asm["ptx"])


@pytest.mark.parametrize(("heads", "group"), [(64, 1), (20, 3)])
def test_the_hopper_kernel_does_not_spill_and_uses_its_instructions(heads, group):
    constants = {"FORM": list_form(heads, group, 64, 2048 * group)}
    if group == 1:
        constants["counts"] = None
    types = TYPES | {"out_strides": ("i32",) * 3}
    compiled = compile_kernel(_sparse_mla_hopper_kernel, 90, constants, types, GluonASTSource, num_warps=4)
    assert stack_bytes(compiled) == 0
    assert compiled.metadata.shared <= SHARED_KB[90] * 1024
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n256k16" in ptx and "setmaxnreg" in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx) and "cp.async.mbarrier.arrive.noinc" in ptx


def test_merging_key_lists_compiles(group=3):
    constants = {"K": 2048, "GROUP": group, "OWNER_SHIFT": owner_shift(group), "BLOCK_K": 2048}
    pointers = {"indices": "*i32", "packed": "*i32", "counts": "*i32", "scratch": "*i16"}
    compile_kernel(_merge_key_lists_kernel, 90, constants, pointers, num_warps=16, maxnreg=64)
