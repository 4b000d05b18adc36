"""Expert weights as checkpoints hold them, one tensor an expert, made the stacked ones of the module.

`from_pretrained` does so by transformers' table of conversions. What reads a checkpoint's file by itself and calls
`load_state_dict(strict=False)`, as `Trainer` does to resume, would leave the experts as they were, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def with_stacked_experts(
    state: Mapping[str, torch.Tensor], prefix: str, num_experts: int
) -> Mapping[str, torch.Tensor]:
    """The tensors of one experts module, stacked where they come one by one.

    Args:
        state: tensors by name.
        prefix: of the module's names, `model.layers.1.mlp.experts.` say.
        num_experts: of the module.

    Returns:
        `state` itself unless all of `{prefix}{expert}.{gate,up,down}_proj.weight` are in it; else a copy without
        them and with `gate_up_proj [num_experts, 2 * intermediate, hidden]` and `down_proj [num_experts, hidden,
        intermediate]`.
    """
    names = {
        part: [f"{prefix}{expert}.{part}_proj.weight" for expert in range(num_experts)]
        for part in ("gate", "up", "down")
    }
    if not all(name in state for listed in names.values() for name in listed):
        return state
    parts = {part: torch.stack([state[name] for name in listed]) for part, listed in names.items()}
    taken = {name for listed in names.values() for name in listed}
    rest = {name: tensor for name, tensor in state.items() if name not in taken}
    rest[f"{prefix}gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
    rest[f"{prefix}down_proj"] = parts["down"]
    return rest
