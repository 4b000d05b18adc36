"""Triton, if it is installed, and whether kernels run in it for given tensors.

Kernels' files import `triton` and `tl` from here, and define what needs them where `triton` is not None.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

NO_TRITON = "Triton is not installed (pip install triton)"
# Triton decides when it is imported.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
HALF_PRECISION = (torch.bfloat16, torch.float16)


def has_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`: on a GPU, or anywhere in Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or INTERPRETED)


def why_not_fused(*tensors: torch.Tensor) -> str | None:
    """Why passes that fuse a few operations of PyTorch do not take these tensors, or None.

    Their gradient is PyTorch's own.
    """
    dtype = tensors[0].dtype
    if dtype not in HALF_PRECISION or any(t.dtype != dtype for t in tensors):
        return "it takes bfloat16 or float16 tensors of one dtype"
    if needs_gradient(*tensors):
        return "it has no gradient"
    return None


def needs_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
