"""Layers on several devices, or with weights that are elsewhere: what crosses over to them, and what is fetched.

accelerate's hooks would move every argument of every module at every call, and fetch an offloaded weight for every
block of tokens that a streamed forward takes. Here whatever a layer reads is moved once, where the device changes, and
offloaded weights are fetched once for a layer's attention and once for its feed-forward, never more at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from .module_hooks import hooks_of, is_offloaded, placement_of

_VISITING = "_indexcache_visiting"


def moved_to(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`: a tensor, something with a `to` of its own, or tuples of such."""
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, tuple):
        parts = [moved_to(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def device_of_layer(layer: nn.Module, current: torch.device) -> torch.device:
    """Where `layer` wants its inputs, which are on `current`: stays there unless accelerate placed the layer."""
    placement = placement_of(layer)
    return current if placement is None or placement.returns else placement.device


class DeviceRange(NamedTuple):
    """Consecutive layers `first` to `last` on one device."""

    first: int
    last: int
    device: torch.device


def device_ranges(layers: Iterable[nn.Module], current: torch.device) -> list[DeviceRange]:
    """Layers, the first of which gets tensors of `current`, as the fewest ranges that stay on one device each."""
    ranges: list[DeviceRange] = []
    for index, layer in enumerate(layers):
        current = device_of_layer(layer, current)
        if ranges and ranges[-1].device == current:
            ranges[-1] = ranges[-1]._replace(last=index + 1)
        else:
            ranges.append(DeviceRange(index, index + 1, current))
    return ranges


def runs_on_one_device(model: Any, device: torch.device) -> bool:
    """Whether a decoder's layers, last norm and rotary embedding all stay on `device`, with their weights."""
    if any(device_of_layer(layer, device) != device for layer in model.layers):
        return False
    placements = map(placement_of, (model.norm, model.rotary_emb))
    return all(found is None or (found.device == device and not found.offloads) for found in placements)


def device_of_inputs(model: Any) -> torch.device:
    """Where a decoder's embeddings come out."""
    placement = placement_of(model.embed_tokens)
    return next(model.parameters()).device if placement is None else placement.device


def direct(module: nn.Module, device: torch.device) -> Callable[..., Any]:
    """What to call for `module(...)` with all inputs on `device`: past a hook that would only find them there."""
    placement = placement_of(module)
    passes = (
        placement is not None
        and placement.device == device
        and not placement.offloads
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and module._compiled_call_impl is None
        and not hooks_of(module)
    )
    return module._old_forward if passes else module  # type: ignore[return-value]


def onloaded(*modules: nn.Module) -> AbstractContextManager[None]:
    """Keep offloaded weights of `modules` and all their parts where they run, so that one transfer serves all calls.

    Meanwhile accelerate's hooks on those parts have nothing to fetch; afterwards they are what they were, and the
    weights are gone from the device, also after an error.
    """
    parts = offloaded_parts(modules)
    return _fetched(parts) if parts else nullcontext()


@contextmanager
def _fetched(parts: list[nn.Module]) -> Iterator[None]:
    visited: list[tuple[nn.Module, Any]] = []
    try:
        for part in parts:
            hook: Any = part._hf_hook
            stand_in = _visiting_hook(part)
            hook.pre_forward(part)
            visited.append((part, hook))
            part._hf_hook = stand_in
        yield
    finally:
        for part, hook in reversed(visited):
            part._hf_hook = hook
            hook.post_forward(part, None)


def offloaded_parts(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules among `modules` and their parts whose weights are elsewhere until they are called."""
    if torch.compiler.is_compiling() or "accelerate.hooks" not in sys.modules:
        return []
    found, left = [], list(modules)
    while left:
        # As `modules()`, which would take many times as long for a decoding step.
        module = left.pop()
        own = module.__dict__ if module is not None else None
        if own is None:
            continue
        if "_hf_hook" in own and is_offloaded(module):
            found.append(module)
        if own["_modules"]:
            left.extend(own["_modules"].values())
    return found


def is_visiting(module: nn.Module) -> bool:
    """Whether weights of `module` or its parts are elsewhere but for the time of a call: nothing of them is kept."""
    return any(
        getattr(vars(part).get("_hf_hook"), _VISITING, False) or is_offloaded(part) for part in module.modules()
    )


def _visiting_hook(part: nn.Module) -> Any:
    """What stands in for the hook of a part whose weights were fetched: it moves inputs and no weights."""
    accelerate: Any = sys.modules["accelerate.hooks"]
    placement = placement_of(part)
    assert placement is not None
    hook = accelerate.AlignDevicesHook(execution_device=placement.device)
    setattr(hook, _VISITING, True)
    return hook
