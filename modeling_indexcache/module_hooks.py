"""Who watches a module: its own hooks and those on every module. Fast paths run only where nobody would notice."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _modules
from transformers.utils import output_capturing


def hooks_of(module: nn.Module) -> list[Any]:
    """Forward hooks that a call of `module` runs, PyTorch's hooks on every module included."""
    return [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *_modules._global_forward_pre_hooks.values(),
        *_modules._global_forward_hooks.values(),
    ]


def runs_as_written(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's forward alone: no hook of anyone's, no forward of its own."""
    return not hooks_of(module) and "forward" not in vars(module)


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks, but for the recorders that transformers leaves behind, when they record nothing."""
    hooks = hooks_of(module)
    return bool(hooks) and (recording() or any(map(is_foreign, hooks)))


def is_foreign(hook: Any) -> bool:
    """Whether a hook is anything but transformers' own recorder of outputs."""
    module = getattr(getattr(hook, "func", hook), "__module__", "")
    return module != "transformers.utils.output_capturing"


def recording() -> bool:
    """Whether transformers' recorders record; True where this transformers does not say."""
    collector = getattr(output_capturing, "_active_collector", None)
    # In a forward that nothing is wanted of it is there, and empty.
    return collector is None or bool(collector.get())
