"""What the block fp8 benchmarks multiply: DeepSeek-V3.2's matrices, of random codes and scales, tokens and experts."""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.block_fp8.block_fp8_format import E4M3, dequantise, scale_grid

HIDDEN, INNER, EXPERTS, ACTIVE = 7168, 2048, 256, 8
# Columns and rows of the weights: 128 heads of 128 + 64, latents of 512 + 64.
PROJECTIONS = {
    "q_a_proj": (HIDDEN, 1536),
    "kv_a_proj": (HIDDEN, 576),
    "q_b_proj": (1536, 24576),
    "kv_b_proj": (512, 32768),
    "o_proj": (16384, HIDDEN),
    "gate_proj (dense)": (HIDDEN, 18432),
    "down_proj (dense)": (18432, HIDDEN),
}
# More than any L2, in bytes of weights.
BEYOND_L2 = 2**28
# Of many rows so many are checked.
CHECKED_ROWS = 48

Matrix = tuple[torch.Tensor, torch.Tensor]


def matrix(*shape: int) -> Matrix:
    """Random e4m3 `[..., rows, columns]` and scales; dequantised its entries are about 0.02."""
    # Codes from 0x20 to 0x77 are 0.125 to 240; the sign is the highest bit.
    codes = torch.randint(0x20, 0x78, shape, dtype=torch.uint8, device="cuda")
    codes |= torch.randint(0, 2, shape, dtype=torch.uint8, device="cuda") << 7
    grid = (*shape[:-2], *scale_grid(shape[-2], shape[-1], (128, 128)))
    return codes.view(E4M3), torch.rand(grid, device="cuda") * 4e-4 + 1e-4


def rows(tokens: int, width: int) -> torch.Tensor:
    """Random activations in bf16."""
    return torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)


class ExpertWeights:
    """One layer's experts, made when first asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def fp8(self) -> tuple[Matrix, Matrix, tuple[Matrix, Matrix, Matrix]]:
        """Gate above up, down, and the shared expert's."""
        if "fp8" not in self._made:
            shared = matrix(INNER, HIDDEN), matrix(INNER, HIDDEN), matrix(HIDDEN, INNER)
            self._made["fp8"] = matrix(EXPERTS, 2 * INNER, HIDDEN), matrix(EXPERTS, HIDDEN, INNER), shared
        return self._made["fp8"]

    def bf16(self) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """The same, dequantised."""
        if "bf16" not in self._made:
            gate_up, down, shared = self.fp8()
            self._made["bf16"] = dequantise(*gate_up), dequantise(*down), tuple(dequantise(*m) for m in shared)
        return self._made["bf16"]


def make_tokens(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, and each token's experts, all equally likely, and weights."""
    chosen = torch.rand(tokens, EXPERTS, device="cuda").topk(ACTIVE).indices
    return rows(tokens, HIDDEN), chosen, torch.rand(tokens, ACTIVE, device="cuda") / ACTIVE
