"""Where new tokens' rows go in a cache of fixed length, read on the device: a recorded step writes anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..common.argument_checks import check_tensors


class CacheSlot(NamedTuple):
    """Rows from `position` on.

    Attributes:
        rows: `[B, T, D]`, the memory of all tokens; each row contiguous and behind the one before.
        position: int64 `[1]`, of the first new token, on the rows' device. What would go behind T is dropped.
    """

    rows: torch.Tensor
    position: torch.Tensor

    def takes(self, new: torch.Tensor) -> bool:
        """Whether a kernel may write rows like `new [B, S, D]`."""
        width = new.shape[-1]
        return (
            self.rows.dtype == new.dtype
            and self.rows.shape[::2] == new.shape[::2]
            and self.rows.stride()[1:] == (width, 1)
            and self.rows.data_ptr() % 16 == 0
        )

    def write(self, new: torch.Tensor) -> torch.Tensor:
        """Write `new [B, S, D]` in PyTorch; `rows`."""
        places = self.position + torch.arange(new.shape[1], device=new.device)
        return self.rows.index_copy_(1, places, new)


def write_to_slot(kernel: Callable[..., torch.Tensor], new: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """`kernel(new, *arguments)`, whose last argument is a slot or None, where the kernel can write to the slot.

    Elsewhere it is run without one, and PyTorch writes the rows.
    """
    slot: CacheSlot | None = arguments[-1]
    if slot is None or slot.takes(new):
        return kernel(new, *arguments)
    return slot.write(kernel(new, *arguments[:-1]))


def check_slot(operation: str, slot: CacheSlot | None, new: torch.Tensor) -> None:
    """`slot` holds rows for `new [B, S, D]`, or is None.

    Raises:
        TypeError: for a part of it that is no tensor.
        ValueError: for rows of another batch, width, dtype or device, or a position that is not int64 `[1]`.
    """
    if slot is None:
        return
    check_tensors(operation, **{"what is cached": new, "slot.rows": slot.rows, "slot.position": slot.position})
    if slot.rows.dim() != 3 or slot.rows.shape[::2] != new.shape[::2] or slot.rows.dtype != new.dtype:
        wanted, got = f"[B, T, D] of B, D = {tuple(new.shape[::2])}", f"{slot.rows.dtype} of {tuple(slot.rows.shape)}"
        raise ValueError(f"{operation}: slot.rows must be {new.dtype} {wanted}, got {got}")
    if slot.position.dtype != torch.int64 or slot.position.shape != (1,):
        got = f"{slot.position.dtype} of {tuple(slot.position.shape)}"
        raise ValueError(f"{operation}: slot.position must be int64 [1], got {got}")
