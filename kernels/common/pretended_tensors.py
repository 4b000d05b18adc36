"""Tensors without memory that say they are on a GPU: a model runs on them, and what it would launch is recorded.

No GPU is needed, nor a PyTorch that was built for one. PyTorch sees tensors of its `meta` device, which have shapes,
strides and dtypes; this package's code sees CUDA tensors of the simulated target. Tensors have no values:
whether all of a mask is True is answered with False.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .custom_op import function_of
from .device_target import DeviceTarget, pretended_target
from .kernel_launch import recorded_launches

CUDA, META = torch.device("cuda", 0), torch.device("meta")


class PretendedTensor(torch.Tensor):
    """A `meta` tensor that says it is on `cuda:0`."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Whether it says that it is on a GPU: yes."""
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that it says it is on."""
        return CUDA

    def get_device(self) -> int:
        """The index of that device."""
        return 0


# Types of weights that are nothing but a tensor: no subclass that quantises, shards or offloads.
PLAIN_WEIGHTS = (torch.nn.Parameter, PretendedTensor)


def pretended(value: Any) -> Any:
    """A tensor as one that says it is on a GPU, without its memory; other values as they are."""
    if not isinstance(value, torch.Tensor) or isinstance(value, PretendedTensor):
        return value
    return value.detach().to(META).as_subclass(PretendedTensor)


def _plain(value: Any) -> Any:
    """What PyTorch is given in place of an argument."""
    if isinstance(value, PretendedTensor):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, torch.device) and value.type == "cuda":
        return META
    return "meta" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def _without_memory(value: Any) -> Any:
    """What PyTorch gave, its `meta` tensors as simulated CUDA tensors."""
    return value.as_subclass(PretendedTensor) if type(value) is torch.Tensor and value.is_meta else value


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of a value, or of what a tuple or list holds; shapes are no such tuples."""
    if isinstance(value, torch.Size) or not isinstance(value, (tuple, list)):
        return function(value)
    held = [_mapped(function, each) for each in value]
    return type(value)(*held) if hasattr(value, "_fields") else type(value)(held)


class _Pretending(TorchFunctionMode):
    """PyTorch's functions on simulated tensors; this package's custom operations run as they are written."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called in place of every function of PyTorch."""
        if func is torch.Tensor.__bool__:
            return False
        own = function_of(func)
        if own is not None:
            with self:
                return own(*args, **(kwargs or {}))
        plain = {name: _mapped(_plain, value) for name, value in (kwargs or {}).items()}
        return _mapped(_without_memory, func(*_mapped(_plain, args), **plain))


@contextmanager
def pretended_launches(
    target: DeviceTarget, record: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Let CUDA tensors that are made in this thread have no memory, and its launches only be recorded.

    Args:
        target: of the simulated device.
        record: called with kernel, grid, arguments and options of every launch.
    """
    with _Pretending(), pretended_target(target), recorded_launches(record), torch.no_grad():
        yield
