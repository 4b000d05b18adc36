"""The distillation kernels' default tiles compile for every architecture, within its shared memory."""

import pytest

pytest.importorskip("triton")

from testing.compiled_kernels import SHARED_KB, compile_kernel, stack_bytes

from indexcache.kernels.common.device_target import DeviceTarget
from indexcache.kernels.indexer_distillation import indexer_distillation_dense_triton as dense
from indexcache.kernels.indexer_distillation import indexer_distillation_teacher_triton as teacher
from indexcache.kernels.indexer_distillation import indexer_distillation_triton as selected

TYPES = {
    "indices": "*i32",
    "query_start": "*i64",
    "key_start": "*i32",
    "key_mask": "*u8",
    **dict.fromkeys(["q", "k", "kv", "weights", "grad_q", "grad_weights"], "*bf16"),
    **dict.fromkeys(["target", "result", "stats", "kl", "lse", "probabilities", "grad", "largest", "grad_k"], "*fp32"),
    **dict.fromkeys(["scale", "scale_log2", "inverse_heads", "factor"], "fp32"),
}


def kernels(arch):
    """Every kernel of the 30B shape with its constants and default tile."""
    target = DeviceTarget("hip" if isinstance(arch, str) else "cuda", arch, 132)
    index = {"H": 32, "D": 128, "BLOCK_H": 32, "BLOCK_D": 128}
    latent = {"H": 20, "MAIN": 512, "REST": 64, "BLOCK_REST": 64}
    lists = {"BLOCK_K": 2048}
    for backward in (False, True):
        tile = selected.index_tile(target, backward)
        constants = {**index, **lists, "KL": True, "BLOCK_N": tile.block_n}
        if backward:
            extra = {"PER_ENTRY": False, "GRADIENT_SCALE": 1024.0}
            yield selected._index_backward_kernel, constants | extra, tile
        else:
            yield selected._index_forward_kernel, constants, tile
    tile = selected.attention_tile(target, 576)
    yield selected._selected_attention_kernel, {**latent, **lists, "BLOCK_H": 32, "BLOCK_N": tile.block_n}, tile
    for function, tile, extra in (
        (teacher._attention_lse_kernel, teacher.latent_tile(target, 576), {}),
        (teacher._head_mean_kernel, teacher.latent_tile(target, 576), {"ADD": True}),
    ):
        yield function, {**latent, **extra, "BLOCK_Q": tile.block_q, "BLOCK_N": tile.block_n}, tile
    tile = dense.index_tile(target, 32)
    for function in (dense._dense_kl_forward_kernel, dense._dense_kl_grad_q_kernel, dense._dense_kl_grad_k_kernel):
        extra = {"GRADIENT_SCALE": 1024.0} if "GRADIENT_SCALE" in function.arg_names else {}
        yield function, {**index, **extra, "BLOCK_Q": tile.block_q, "BLOCK_N": tile.block_n}, tile


# Of the architectures that share their tiles and their 99 KB with sm86, sm89 and sm120, one is enough.
@pytest.mark.parametrize("arch", [80, 86, 90, 100, "gfx942"])
def test_default_tiles_fit_the_shared_memory_and_do_not_spill_much(arch):
    for function, constants, tile in kernels(arch):
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        compiled = compile_kernel(function, arch, constants, TYPES, **options)
        name = function.__name__
        assert compiled.metadata.shared <= SHARED_KB[arch] * 1024, f"{name}: {compiled.metadata.shared} bytes"
        if arch == 90:
            assert "wgmma.mma_async" in compiled.asm["ptx"], name
            # Sixteen registers that wait for the end of the loop in local memory cost nothing; spills in it are more.
            assert stack_bytes(compiled) <= 64, f"{name}: {stack_bytes(compiled)} bytes of stack"
