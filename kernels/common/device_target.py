"""What is known of a device when a kernel and its tiles are chosen: asked once, or pretended while nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import local
from typing import NamedTuple

import torch


class DeviceTarget(NamedTuple):
    """A GPU as kernels see it.

    Attributes:
        backend: `cuda` or `hip`.
        arch: compute capability (90 is 9.0), or GCN name.
        processors: multiprocessors.
    """

    backend: str
    arch: int | str
    processors: int


class _ThisThread(local):
    # A default in the class: to look for what a `local` lacks takes two microseconds.
    pretended: DeviceTarget | None = None


_thread = _ThisThread()


def device_target(device: torch.device) -> DeviceTarget:
    """The target of a CUDA or HIP device."""
    pretended = _thread.pretended
    return _ask(device) if pretended is None else pretended


def has_capability(device: torch.device, least: int) -> bool:
    """Whether a CUDA device is of compute capability `least` (90: 9.0) or newer."""
    backend, arch, _ = device_target(device)
    return backend == "cuda" and isinstance(arch, int) and arch >= least


@contextmanager
def pretended_target(target: DeviceTarget) -> Iterator[None]:
    """Let every device be `target` in this thread."""
    before = _thread.pretended
    _thread.pretended = target
    try:
        yield
    finally:
        _thread.pretended = before


@lru_cache
def _ask(device: torch.device) -> DeviceTarget:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return DeviceTarget("hip", properties.gcnArchName, properties.multi_processor_count)
    return DeviceTarget("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)
