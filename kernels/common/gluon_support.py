"""Gluon, Triton's language of warps and layouts, if this Triton has it, under the names of its newest release.

Kernels' files import what they use from here, and define what needs it where `gluon` is not None.
"""

from __future__ import annotations

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Renamed after Triton 3.6.
    async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
    load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier
except (ImportError, AttributeError):
    gluon = gl = async_copy = mbarrier = tma = TensorDescriptor = None
    fence_async_shared = warpgroup_mma = warpgroup_mma_wait = async_load = load_tile = barrier = None
