"""Where new tokens' rows go in a cache of fixed length, told on the device: a recorded step writes anywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
