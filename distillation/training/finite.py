"""Whether weights are numbers: what a training step leaves behind, and what a checkpoint is about to hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.utils import get_total_norm


@torch.no_grad()
def are_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Whether no entry is NaN or infinite, as a boolean scalar on the tensors' device; of shards, this process's.

    Integers always are.

    One pass over the values, without a copy of them.
    """
    parts = [part for part in map(_local, tensors) if part.numel() and part.is_floating_point()]
    return get_total_norm(parts, float("inf")).isfinite() if parts else torch.tensor(True)


@torch.no_grad()
def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor with an entry that is NaN or infinite; None where there is none."""
    return next((name for name, tensor in tensors if not are_finite([tensor])), None)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
