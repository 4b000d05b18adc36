"""Grouped matmul as a loop, for dtypes that PyTorch's own does not take on a CPU."""

import torch


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Rows `offs[i - 1]` to `offs[i]` of `a [N, K]` times `b[i]`, `b [E, K, M]`; NaN in rows of no group."""
    out, first = torch.full((a.shape[0], b.shape[2]), float("nan"), dtype=a.dtype), 0
    for expert, last in enumerate(offs.tolist()):
        out[first:last] = a[first:last] @ b[expert]
        first = last
    return out
