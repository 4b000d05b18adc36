"""The commands that run a plan: conversion, loading, and how the script is started."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..configuration.share_pattern import SharePattern
from ..conversion.convert.families import INDEXCACHE
from ..conversion.io.open_checkpoint import OpenedCheckpoint
from ..conversion.io.sources import FolderSource
from .placement import Placement

SCRIPT = "run.py"


def run_commands(
    opened: OpenedCheckpoint, placement: Placement, pattern: SharePattern, layers: Sequence[int], length: int
) -> dict[str, str | None]:
    """`convert` (None where nothing is to be converted), `load`, lines of a script, and `start`, what runs it.

    Args:
        opened: the checkpoint.
        placement: how it is placed.
        pattern: what it shall run.
        layers: of a device_map, parts on each GPU: embeddings, layers, then norm and head.
        length: tokens of prompt and answer.
    """
    source = opened.source
    path = str(source.folder) if isinstance(source, FolderSource) else source.id
    convert, run = None, path
    if opened.checkpoint.config["model_type"] != INDEXCACHE:
        run = f"./{source.id.rpartition('/')[2]}-indexcache"
        convert = f"indexcache convert {shlex.quote(path)} {shlex.quote(run)} --pattern {pattern.letters}"
    own = convert is not None or pattern == opened.config.share_pattern
    fields = "" if own else f', index_share_pattern="{pattern.letters}"'
    lines = ["import indexcache", "from transformers import AutoModelForCausalLM"]
    where = ""
    if placement.way == "device_map":
        lines += _device_map(layers)
        where = ", device_map=device_map"
    elif placement.splits:
        sizes = f"tp_size={placement.gpus}" + (
            f", ep_size={placement.gpus}" if placement.way == "expert parallel" else ""
        )
        lines.append("from transformers.distributed import DistributedConfig")
        where = f", distributed_config=DistributedConfig({sizes})"
    else:
        where = ', device_map={"": 0}'
    lines.append(f'model = AutoModelForCausalLM.from_pretrained({run!r}, dtype="auto"{where}{fields})')
    start = f"torchrun --nproc-per-node {placement.gpus} {SCRIPT}" if placement.splits else f"python {SCRIPT}"
    return {"convert": convert, "load": "\n".join(lines), "start": start}


def _device_map(parts: Sequence[int]) -> list[str]:
    """Lines that make the map of `parts` on each GPU."""
    counts = list(parts)
    while len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    # The first and the last part are embeddings, and norm and head.
    counts[0] -= 1
    counts[-1] -= 1
    return [
        f"layers = {counts}  # on each GPU",
        'device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0}',
        "gpu_of = [gpu for gpu, count in enumerate(layers) for _ in range(count)]",
        'device_map |= {f"model.layers.{layer}": gpu for layer, gpu in enumerate(gpu_of)}',
        f'device_map |= {{"model.norm": {len(counts) - 1}, "lm_head": {len(counts) - 1}}}',
    ]
