"""Kernels of a recorded decoding step that begin before the one ahead of them has ended."""

from __future__ import annotations

from typing import Any

import torch

MODE = 0


def early_launch(least: int = 1) -> dict[str, Any]:
    """Launch options of a kernel with a constexpr EARLY."""
    if least <= MODE and torch.cuda.is_current_stream_capturing():
        return {"EARLY": MODE, "launch_pdl": True}
    return {}
