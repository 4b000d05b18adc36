"""FSDP2 as `accelerate launch --use_fsdp --fsdp_version 2` sets it up: what the first process read, all get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def gather_whole_states(fsdp_plugin: Any) -> None:
    """Let checkpoints of accelerate's FSDP hold whole tensors, read and written by the first process."""
    # What the launcher's own kind of state needed would stay, and lacks what this one needs.
    fsdp_plugin.state_dict_config = fsdp_plugin.optim_state_dict_config = None
    fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")


@contextmanager
def spread_by_accelerate(model: Any) -> Iterator[None]:
    """While optimiser and model are made and sharded, show accelerate what it can spread from the first process.

    The launcher's default lets that process alone read the weights (`fsdp_cpu_ram_efficient_loading`), the others hold
    shapes. accelerate then spreads every entry of the state dict as a sharded parameter, and fails on a buffer (the
    routers' `e_score_correction_bias`), which is none; and it knows an optimiser's parameters by their addresses, of
    which shapes have none.
    """
    _materialise(model)
    entries = [
        (module, name)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    values: list[Any] = (
        [module._buffers[name] for module, name in entries] if dist.get_rank() == 0 else [None] * len(entries)
    )
    dist.broadcast_object_list(values)
    for (module, name), value in zip(entries, values):
        module._buffers[name] = value
        # Buffers outside the state dict accelerate takes along as each process has them.
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in entries:
            module._non_persistent_buffers_set.discard(name)


def _materialise(model: nn.Module) -> None:
    """Give parameters that are shapes alone memory of their own, as yet unwritten; tied ones share it."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in made:
                    empty = torch.empty_like(parameter, device="cpu")
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]
