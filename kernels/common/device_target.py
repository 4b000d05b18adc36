"""What is known of a device when a kernel and its tiles are chosen: asked once, or simulated while nothing runs."""

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


# Multiprocessors of each architecture's largest device: they decide on grids, and on paths for short prompts.
TARGETS = {
    "sm_80": DeviceTarget("cuda", 80, 108),
    "sm_86": DeviceTarget("cuda", 86, 84),
    "sm_89": DeviceTarget("cuda", 89, 142),
    "sm_90": DeviceTarget("cuda", 90, 132),
    "sm_100": DeviceTarget("cuda", 100, 148),
    "sm_103": DeviceTarget("cuda", 103, 148),
    "sm_120": DeviceTarget("cuda", 120, 188),
}


class _ThisThread(local):
    # A default in the class: to look for what a `local` lacks takes two microseconds.
    pretended: DeviceTarget | None = None


_thread = _ThisThread()
# What tiles and paths are chosen for where Triton's interpreter runs a CPU's tensors.
_INTERPRETER = DeviceTarget("cuda", 80, 4)


def device_target(device: torch.device) -> DeviceTarget:
    """The target of a CUDA or HIP device; of any other what the interpreter runs as."""
    pretended = _thread.pretended
    return _ask(device) if pretended is None else pretended


def has_capability(device: torch.device, least: int) -> bool:
    """Whether a CUDA device is of compute capability `least` (90: 9.0) or newer."""
    backend, arch, _ = device_target(device)
    return backend == "cuda" and isinstance(arch, int) and arch >= least


def why_too_old(device: torch.device) -> str | None:
    """Why no kernel that multiplies matrices runs on `device`, or None."""
    if device_target(device).backend == "hip" or has_capability(device, 80):
        return None
    return "the kernels need compute capability 8.0 or newer"


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
    if device.type != "cuda":
        return _INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return DeviceTarget("hip", properties.gcnArchName, properties.multi_processor_count)
    return DeviceTarget("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)
