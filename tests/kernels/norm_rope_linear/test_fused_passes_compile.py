"""The fused passes compile for every architecture, within its shared memory."""

import pytest

pytest.importorskip("triton")

import triton
from testing.compiled_kernels import SHARED_KB, compile_kernel

from indexcache.kernels.experts import expert_groups_triton, expert_topk_triton, routed_experts_triton
from indexcache.kernels.lightning_indexer import lightning_indexer_decode_triton
from indexcache.kernels.norm_rope_linear import (
    absorbed_vector_triton,
    index_keys_triton,
    rms_norm_triton,
    rotary_triton,
    vector_linear_triton,
)
from indexcache.kernels.sparse_mla import sparse_mla_triton

TYPES = {
    **dict.fromkeys(
        ("x", "out", "weight", "cos", "sin", "normed", "gate_up", "gate", "up", "hidden", "down"), "*bf16"
    ),
    **dict.fromkeys(("shared_down", "base", "routed", "shared"), "*bf16"),
    **dict.fromkeys(("q", "to_latent", "latent_out", "to_value"), "*bf16"),
    **dict.fromkeys(("norm", "weight0", "weight1", "weight2", "weight3"), "*bf16"),
    **dict.fromkeys(("bias", "logits", "weights"), "*fp32"),
    **dict.fromkeys(("chosen", "experts", "place", "position"), "*i64"),
    **dict.fromkeys(("counts", "starts", "ends"), "*i32"),
    **dict.fromkeys(("eps", "scale", "scaling", "masked_score"), "fp32"),
}
# The 30B shape, and GLM-5's and DeepSeek-V3.2's numbers of experts.
WIDTH, INNER = 2048, 1536
CASES = {
    "norm": (
        rms_norm_triton.rms_norm_rope_kernel,
        dict(N=WIDTH, R=0, ROWS=2, BLOCK=2048, INTERLEAVED=False, HAS_SLOT=False),
        4,
        3,
    ),
    "latent": (
        rms_norm_triton.rms_norm_rope_kernel,
        dict(N=512, R=64, ROWS=8, BLOCK=512, INTERLEAVED=True, HAS_SLOT=True),
        4,
        3,
    ),
    "index keys": (
        index_keys_triton.index_key_kernel,
        dict(D=128, R=64, ROWS=16, BLOCK=128, INTERLEAVED=True, HAS_SLOT=True),
        4,
        3,
    ),
    "rotate": (rotary_triton.rotate_kernel, dict(H=20, R=64, PAIRS=64, INTERLEAVED=True), 4, 3),
    "rotate halves": (rotary_triton.rotate_kernel, dict(H=64, R=64, PAIRS=64, INTERLEAVED=False), 4, 3),
    **{
        f"route {experts} experts, {'few' if few else 'many'} tokens": (
            expert_topk_triton.expert_topk_kernel,
            dict(
                E=experts,
                EP=max(16, triton.next_power_of_2(experts)),
                D=WIDTH,
                K=4,
                BLOCK=16 if few or experts > 128 else 64,
                BLOCK_D=128 if few and experts <= 128 else 64,
                NORMALISE=True,
                G=8 if experts == 256 else 1,
                KEPT=4 if experts == 256 else 1,
            ),
            4,
            4 if experts <= 128 else 2,
        )
        for experts, few in ((64, True), (64, False), (160, False), (256, True))
    },
    **{
        f"route one token, {experts} experts": (
            expert_topk_triton.expert_topk_vector_kernel,
            dict(
                E=experts,
                EP=experts,
                D=WIDTH,
                K=4,
                COLUMNS=min(WIDTH, 16384 // experts) if experts > 16 else WIDTH,
                NORMALISE=True,
                HAS_NORM=True,
                HAS_LOGITS=False,
                G=4,
                KEPT=2,
            ),
            16,
            3,
        )
        for experts in (16, 64)
    },
    "logits of one token": (
        expert_topk_triton.expert_logits_kernel,
        dict(E=256, D=7168, LOGITS=2, COLUMNS=2048, HAS_NORM=True),
        8,
        3,
    ),
    "choose for one token, 256 experts": (
        expert_topk_triton.choose_experts_kernel,
        dict(E=256, EP=256, K=8, NORMALISE=True, G=8, KEPT=4),
        4,
        3,
    ),
    "up": (
        routed_experts_triton.experts_up_vector_kernel,
        dict(D=WIDTH, INNER=INNER, SHARED=INNER, K=4, ROWS=4, COLUMNS=2048),
        4,
        3,
    ),
    "down": (
        routed_experts_triton.experts_down_vector_kernel,
        dict(D=WIDTH, INNER=INNER, SHARED=INNER, K=4, ROWS=4, COLUMNS=2048, HAS_BASE=True),
        4,
        3,
    ),
    "absorb": (
        absorbed_vector_triton.absorb_queries_kernel,
        dict(H=20, N=192, BLOCK_N=256, R=64, BLOCK_R=32, C=512, ENTRIES=32, INTERLEAVED=True),
        4,
        3,
    ),
    "values": (
        absorbed_vector_triton.expand_values_kernel,
        dict(H=20, V=256, C=512, BLOCK_C=512, ENTRIES=16),
        4,
        3,
    ),
    "linear": (
        vector_linear_triton.vector_linear_kernel,
        dict(D=WIDTH, N0=768, N1=576, N2=0, N3=0, ROWS=4, COLUMNS=2048, HAS_NORM=True, HAS_BASE=True, HAS_SCALE=False),
        4,
        3,
    ),
    "head weights": (
        vector_linear_triton.vector_linear_kernel,
        dict(D=WIDTH, N0=32, N1=0, N2=0, N3=0, ROWS=4, COLUMNS=2048, HAS_NORM=False, HAS_BASE=False, HAS_SCALE=True),
        4,
        3,
    ),
    **{
        f"{name}, {experts} experts": (kernel, dict(E=experts, EP=experts, ROWS=8192 // experts, **more), 4, 3)
        for name, kernel, more in (
            ("count", expert_groups_triton.count_experts_kernel, dict(PAIRS=512)),
            ("starts", expert_groups_triton.start_experts_kernel, {}),
            ("places", expert_groups_triton.place_pairs_kernel, dict(PAIRS=512)),
        )
        for experts in (16, 64, 256)
    },
    "copy": (routed_experts_triton.copy_rows_kernel, dict(D=WIDTH, BLOCK=2048, K=4, ROWS=2), 4, 3),
    "gate": (routed_experts_triton.gated_kernel, dict(D=INNER, BLOCK=1024, ROWS=4), 4, 3),
    "combine": (
        routed_experts_triton.combine_kernel,
        dict(D=WIDTH, BLOCK=2048, K=4, HAS_SHARED=True, HAS_BASE=True),
        4,
        3,
    ),
}


def compile_case(name, arch, early=0):
    kernel, constants, warps, stages = CASES[name]
    early = {"EARLY": early} if "EARLY" in kernel.arg_names else {}
    launch = {"launch_pdl": True} if early.get("EARLY") else {}
    return compile_kernel(kernel, arch, {**constants, **early}, TYPES, num_warps=warps, num_stages=stages, **launch)


# Routing alone uses much shared memory; the rest is compiled for one target of each kind.
@pytest.mark.parametrize(
    ("name", "arch"),
    [(n, a) for n in CASES for a in SHARED_KB if "experts" in n or a in (90, "gfx942")],
    ids=str,
)
def test_fits_shared_memory(name, arch):
    assert compile_case(name, arch).metadata.shared <= SHARED_KB[arch] * 1024


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "EARLY" in case[0].arg_names])
def test_an_early_kernel_writes_nothing_before_it_has_waited(name):
    ptx = compile_case(name, 90, early=True).asm["ptx"]
    assert 0 < ptx.index("griddepcontrol.wait") < ptx.index("st.global")
    assert "griddepcontrol" not in compile_case(name, 90).asm["ptx"]


def test_weights_are_asked_for_before_the_wait():
    ptx = compile_case("linear", 90, early=True).asm["ptx"]
    assert ptx.index("ld.global") < ptx.index("griddepcontrol.wait")


@pytest.mark.parametrize("module", [lightning_indexer_decode_triton, sparse_mla_triton])
def test_the_kernels_between_them_wait_at_once(module):
    early = [value for value in vars(module).values() if "EARLY" in getattr(value, "arg_names", ())]
    kernels = [kernel for kernel in early if kernel.fn.__module__ == module.__name__]
    assert len(kernels) >= 2
    for kernel in kernels:
        first = kernel.src[kernel.src.index("EARLY: tl.constexpr = False") :].split("\n", 6)
        assert any("wait_for_kernels_ahead(EARLY)" in line for line in first), kernel.__name__
