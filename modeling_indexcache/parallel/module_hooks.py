"""What stands on a module: hooks, forwards of its own, accelerate's placement. `eligibility.py` asks what that means.

accelerate replaces `forward` of every module of a model spread over devices. What its hook does is known: it moves
inputs, and may fetch weights that lie elsewhere between calls. Such a module is *placed*, and no stranger.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as _modules
from transformers.utils import output_capturing

# In the package this file is in a folder of its own, beside a checkpoint all files are in one.
_PACKAGE = __name__.removesuffix(".module_hooks").removesuffix(".parallel") + "."


class Placement(NamedTuple):
    """What accelerate's hooks on a module do when it is called.

    Attributes:
        device: inputs are moved there, and weights are there while the module runs.
        offloads: the weights are elsewhere until then, and again after it.
        returns: the output is moved to where the input came from.
    """

    device: torch.device
    offloads: bool
    returns: bool


def placement_of(module: nn.Module) -> Placement | None:
    """How accelerate placed a module whose forward is its class's otherwise; None without hooks or with other ones."""
    forward = vars(module).get("forward")
    if forward is None or type(forward) is not partial:
        return None
    accelerate = sys.modules.get("accelerate.hooks")
    inner = vars(module).get("_old_forward")
    if (
        accelerate is None
        or getattr(forward.func, "__module__", None) != accelerate.__name__
        or getattr(inner, "__func__", None) is not type(module).forward
    ):
        return None
    hook: Any = vars(module).get("_hf_hook")
    hooks = hook.hooks if type(hook) is accelerate.SequentialHook else (hook,)
    if any(type(part) is not accelerate.AlignDevicesHook or part.execution_device is None for part in hooks):
        return None
    devices = {_device(part.execution_device) for part in hooks}
    if len(devices) != 1:
        return None
    return Placement(devices.pop(), any(h.offload for h in hooks), any(h.io_same_device for h in hooks))


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights are elsewhere until it is called."""
    placement = placement_of(module)
    return placement is not None and placement.offloads


def is_own(module: nn.Module) -> bool:
    """Whether a module is of a class defined here: what wraps, replaces or subclasses ours is called as a module."""
    return type(module).__module__.startswith(_PACKAGE)


def hooks_of(module: nn.Module) -> list[Any]:
    """Forward hooks that a call of `module` runs, PyTorch's hooks on every module included."""
    return [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *_modules._global_forward_pre_hooks.values(),
        *_modules._global_forward_hooks.values(),
    ]


def is_foreign(hook: Any) -> bool:
    """Whether a hook is anything but transformers' own recorder of outputs."""
    module = getattr(getattr(hook, "func", hook), "__module__", "")
    return module != "transformers.utils.output_capturing"


def recording() -> bool:
    """Whether transformers' recorders record; True where this transformers does not say."""
    collector = getattr(output_capturing, "_active_collector", None)
    # In a forward that nothing is wanted of it is there, and empty.
    return collector is None or bool(collector.get())


def _device(place: Any) -> torch.device:
    """The device that tensors moved to `place` (an index, a name, a device) say they are on."""
    device = torch.device(place)
    if device.index is None and device.type not in ("cpu", "meta"):
        return torch.device(device.type, torch.accelerator.current_device_index())
    return device
