"""Kernels that begin before the one ahead of them has ended: programmatic dependent launch, from Hopper on.

A step of one token is hundreds of kernels of a few microseconds, and a GPU that starts each only when the last is done
idles between them. Inside `early_launches` a kernel's programs start as soon as those of the kernel ahead have all
begun and waited themselves; they read weights, which no kernel of the step writes, and wait before they touch
anything else. So every kernel with a constexpr EARLY waits in each of its programs, and what a kernel wrote is there
for all that follow.

Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import local
from typing import Any

import torch

from .device_target import has_capability
from .triton_support import tl, triton


class _ThisThread(local):
    # Defaults in the class: to look for what a `local` lacks takes two microseconds.
    early = False
    in_turn = False


_thread = _ThisThread()


@contextmanager
def early_launches(device: torch.device) -> Iterator[None]:
    """Launch this thread's decoding kernels early, where `device` can. No kernel inside may write weights."""
    before = _thread.early
    _thread.early = not _thread.in_turn and _can_launch_early(device)
    try:
        yield
    finally:
        _thread.early = before


@contextmanager
def launches_in_turn() -> Iterator[None]:
    """Let `early_launches` inside change nothing: a profile of kernels that overlap counts their waiting as time."""
    before = _thread.in_turn
    _thread.in_turn = True
    try:
        yield
    finally:
        _thread.in_turn = before


def early_launch() -> dict[str, Any]:
    """Launch options of a kernel that has a constexpr EARLY."""
    return {"EARLY": True, "launch_pdl": True} if _thread.early else {}


def _can_launch_early(device: torch.device) -> bool:
    return device.type == "cuda" and has_capability(device, 90) and _triton_has_early_launches()


@lru_cache
def _triton_has_early_launches() -> bool:
    try:
        from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    except ImportError:
        return False
    return gdc_wait is not None and gdc_launch_dependents is not None


if triton is not None:

    @triton.jit
    def wait_for_kernels_ahead(EARLY: tl.constexpr):
        """Wait for what the kernels ahead wrote, and let the next one begin."""
        if EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()

else:  # Without Triton there are no kernels to call it; importing its name must work.
    wait_for_kernels_ahead = None
