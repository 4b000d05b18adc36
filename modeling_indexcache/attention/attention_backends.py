"""Which attention backends there are, and which one a machine gets.

`eager` returns attention weights and is the oracle; `sdpa` is PyTorch on any device; `triton` runs the kernels.
"""

from __future__ import annotations

import importlib.util

import torch

TRITON_ATTENTION, EAGER_ATTENTION = "triton", "eager"
# Backends of transformers that take no mask of selected keys.
UNSUPPORTED_ATTENTION = ("flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def resolve_attention_backend(requested: str | None) -> str:
    """The backend to run for `attn_implementation=requested`; None asks for the best that this machine runs.

    Raises:
        ValueError: for a backend that cannot run here or cannot follow a selection of keys, saying what to use.
    """
    if requested is None:
        return "sdpa" if triton_unavailable_reason() else TRITON_ATTENTION
    if requested == TRITON_ATTENTION and (reason := triton_unavailable_reason()):
        raise ValueError(f'attn_implementation="triton" cannot run here: {reason}. Use "sdpa"')
    if requested in UNSUPPORTED_ATTENTION:
        raise ValueError(
            f"attn_implementation={requested!r} cannot follow a selection of keys: "
            'use "triton" (CUDA), "sdpa" or "eager"'
        )
    return requested


def triton_unavailable_reason() -> str | None:
    """Why the Triton kernels cannot run on this machine, or None when they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0 or newer, this device has {torch.cuda.get_device_capability()}"
    return None
