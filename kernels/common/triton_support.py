"""Whether kernels run Triton for given tensors, or PyTorch."""

from __future__ import annotations

import torch

try:
    import triton
except ImportError:
    triton = None


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Whether a Triton kernel may be given `tensor`: one on a GPU, or any in Triton's interpreter."""
    return triton is not None and (tensor.is_cuda or triton.knobs.runtime.interpret)


def runs_triton(*tensors: torch.Tensor) -> bool:
    """True for half-precision CUDA tensors of one dtype outside `torch.compile` and autograd.

    A compiled graph fuses such passes itself; a gradient needs PyTorch's own.
    """
    return (
        triton is not None
        and all(t.is_cuda and t.dtype == tensors[0].dtype for t in tensors)
        and tensors[0].dtype in (torch.bfloat16, torch.float16)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )
