"""`kv_b_proj` by head, for attention in absorbed form: a view where it is a plain weight, else made once and kept.

What a quantised, adapted or sharded `kv_b_proj` multiplies by is known from calling it on the identity alone.
The result is kept for as long as nothing that the call depends on changes: the modules, their tensors (which ones,
where, in-place changes that PyTorch counts) and their settings (adapters switched, merged or scaled). Nothing is kept
while gradients are wanted, while a compiler traces, where hooks watch, or of weights that accelerate fetches for the
time of a call: an offloaded model would fill the device that it was offloaded to spare.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from ...kernels.common.kernel_launch import is_capturing
from ..eligibility import is_plain_block_fp8, is_plain_linear, why_not_kept
from ..parallel.layer_placement import onloaded

Made = tuple[tuple[Any, ...], torch.Tensor]
# Kept outside of the modules, so that no copy, pickle or state dict of a model carries them.
_kept: weakref.WeakKeyDictionary[nn.Module, Made] = weakref.WeakKeyDictionary()


def multiplier(module: nn.Module, width: int, like: torch.Tensor) -> torch.Tensor:
    """What a linear layer without bias multiplies by, `[out, width]`.

    Args:
        module: `nn.Linear` or what replaced it.
        width: of its inputs.
        like: dtype and device of the result, unless `module` is a plain linear layer.
    """
    if is_plain_linear(module):
        return module.weight  # type: ignore[return-value]
    if why_not_kept(module) is not None:
        _kept.pop(module, None)
        with onloaded(module):
            return module.weight if is_plain_linear(module) else _made(module, width, like)  # type: ignore[return-value]
    state = (like.dtype, like.device, *state_of(module))
    known = _kept.get(module)
    if known is None or known[0] != state:
        known = state, _made(module, width, like)
        if is_capturing(like):
            return known[1]  # Its numbers come with the replays.
        _kept[module] = known
    return known[1]


def absorbed_weights(attention: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An attention's `kv_b_proj` by head: `W_UK [H, nope, C]` and `W_UV [H, V, C]`, to multiply `like`'s dtype by."""
    weight = multiplier(attention.kv_b_proj, attention.kv_lora_rank, like)
    by_head = weight.reshape(-1, attention.nope_dim + attention.v_head_dim, attention.kv_lora_rank)
    to_latent, to_value = by_head.split([attention.nope_dim, attention.v_head_dim], dim=1)
    return to_latent, to_value


def kept_of(module: nn.Module) -> Made | None:
    """What is kept of a module: comparable by identity, and alive for as long as somebody holds it."""
    return _kept.get(module)


def still_holds(module: nn.Module, kept: Made) -> bool:
    """Whether `kept`, of `kept_of`, is what a call of the module would give now."""
    return _kept.get(module) is kept and kept[0][2:] == state_of(module)


def _made(module: nn.Module, width: int, like: torch.Tensor) -> torch.Tensor:
    if is_plain_block_fp8(module):
        return module.dequantised(like.dtype)  # type: ignore[operator]
    return module(torch.eye(width, dtype=like.dtype, device=like.device)).transpose(0, 1)


def state_of(module: nn.Module) -> tuple[Any, ...]:
    """Equal for as long as a module and its parts compute the same; holds none of their tensors."""
    found: list[Any] = []
    for part in module.modules():
        tensors = [tensor for kept in (part._parameters, part._buffers) for tensor in kept.values()]
        found.append((id(part), tuple(map(_state_of_tensor, tensors)), settings_of(part)))
    return tuple(found)


def _state_of_tensor(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    if tensor is None:
        return None
    # Tensors made in inference mode count no changes.
    return id(tensor), address_of(tensor), -1 if tensor.is_inference() else tensor._version


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's memory is; of a kind of tensor that does not say, which object it is."""
    try:
        return tensor.data_ptr() or id(tensor)
    except RuntimeError:
        return id(tensor)


def settings_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """A module's attributes that are numbers, words, or collections of such, as they are now."""
    return tuple((name, kept) for name, value in vars(module).items() if (kept := _plain(value)) is not _OTHER)


_OTHER = object()


def _plain(value: Any) -> Any:
    """A copy of `value` if it is made of numbers and words alone, else `_OTHER`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        parts = [(key, _plain(part)) for key, part in value.items()]
        return _OTHER if any(part is _OTHER for _, part in parts) else tuple(parts)
    if isinstance(value, (list, tuple, set, frozenset)):
        members = tuple(map(_plain, value))
        return _OTHER if any(part is _OTHER for part in members) else members
    return _OTHER
