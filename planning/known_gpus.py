"""GPUs whose memory and bandwidth are public, and the size that a user gives in their place."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import NamedTuple

from ..runs.errors import RunError

GIB = 2**30
GPUS_FILE = Path(__file__).with_name("gpus.json")


class Gpu(NamedTuple):
    """A kind of GPU, by its data sheet.

    Attributes:
        key: how `--gpu` names it.
        name: its full name.
        memory: bytes that weights, cache and workspace may take together.
        bandwidth: of its memory, bytes/s.
        bf16: dense products, FLOP/s.
        fp8: the same in e4m3; None without such units.
        link: to the other GPUs of its host, bytes/s, both directions together.
        rates_of: the GPU whose measured rates stand for it; None where nothing was measured.
        source: where the figures were published.
    """

    key: str
    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp8: float | None
    link: float
    rates_of: str | None
    source: str


def known_gpus() -> dict[str, Gpu]:
    """All GPUs of the table, by key."""
    entries = json.loads(GPUS_FILE.read_text(encoding="utf-8"))["gpus"]
    return {
        key: Gpu(
            key,
            entry["name"],
            # A driver reports up to 7 % more than 10^9 bytes per GB; CUDA and the allocator take about as much.
            entry["memory_gb"] * 1e9,
            entry["bandwidth_gbs"] * 1e9,
            entry["bf16_tflops"] * 1e12,
            None if entry["fp8_tflops"] is None else entry["fp8_tflops"] * 1e12,
            entry["link_gbs"] * 1e9,
            entry["rates_of"],
            entry["source"],
        )
        for key, entry in entries.items()
    }


def find_gpu(key: str, memory_gib: float | None = None) -> Gpu:
    """The GPU that `--gpu` names, with the memory that `--memory` gives in GiB.

    Raises:
        RunError: no such GPU, or no positive memory.
    """
    gpus = known_gpus()
    name = key.lower().replace("_", "-")
    if name not in gpus:
        near = difflib.get_close_matches(name, gpus, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RunError(
            f"--gpu {key!r} is not known: {hint}known are {', '.join(gpus)}; for another one give the nearest of them "
            "with --memory GIB"
        )
    if memory_gib is None:
        return gpus[name]
    if not memory_gib > 0:
        raise RunError(f"--memory must be a positive number of GiB (got {memory_gib:g})")
    return gpus[name]._replace(memory=memory_gib * GIB)
