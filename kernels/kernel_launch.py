"""The one place where kernels are launched: under their tensors' device, whichever device is current.

Triton launches on the current device and its stream. PyTorch's own operations follow their tensors, so a model on
`cuda:1`, or one whose layers lie on several devices, runs while the current device is another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def launcher(kernel: Any, grid: tuple[int, ...], like: torch.Tensor) -> Callable[..., Any]:
    """What launches `kernel` on the device of `like`, one of its arguments: `kernel[grid]`, to be called with them.

    Where that device is current already, as in most calls, this costs two look-ups: it hands no arguments on. Nothing
    waits for the device, so graphs can be recorded, and the current device of this thread is as before afterwards.
    """
    index = like.get_device()
    # -1: a CPU's tensors, in Triton's interpreter.
    if index < 0 or index == torch.cuda.current_device():
        return kernel[grid]

    def launch_there(*arguments: Any, **options: Any) -> Any:
        with torch.cuda.device(index):
            return kernel[grid](*arguments, **options)

    return launch_there


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether the stream that runs work on `tensor` is being recorded as a CUDA graph."""
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.get_device()):
        return torch.cuda.is_current_stream_capturing()
