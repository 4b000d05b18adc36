"""Queries as forms of attention take them, and ranges of them whose temporaries stay bounded."""

from __future__ import annotations

import torch

#: `[B, S, H, nope]` and `[B, S, H, R]`, after RoPE.
Queries = tuple[torch.Tensor, torch.Tensor]

# Largest temporary of attention in bytes: masks and scores, or absorbed queries. Queries are taken in chunks that fit.
ATTENTION_BLOCK_BYTES = 128 * 2**20


def chunks(
    num_rows: int, row_bytes: int, multiple: int = 1, least: int = 1, block_bytes: int | None = None
) -> list[tuple[int, int]]:
    """Ranges of rows whose temporaries stay within `block_bytes` (`ATTENTION_BLOCK_BYTES`).

    Their sizes are multiples of `multiple`, or of `least` where so many rows do not fit. A compiled forward takes all
    rows at once: as many ranges as a length needs would be a graph for every length.
    """
    if torch.compiler.is_compiling():
        return [(0, num_rows)]
    step = (ATTENTION_BLOCK_BYTES if block_bytes is None else block_bytes) // max(1, row_bytes)
    unit = multiple if step >= multiple else least
    step = max(least, step - step % unit)
    return [(first, min(first + step, num_rows)) for first in range(0, num_rows, step)] or [(0, 0)]


def joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """The parts in a row; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
