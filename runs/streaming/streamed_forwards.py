"""Forwards of a model whose layers come from its checkpoint: those expected next run side by side in one sweep.

`IndexCacheModel.forward` of the model is replaced: what measures a model by calling it on tokens (losses, recall,
overlap) does so as ever, and gets bit for bit what the model would give if it were in memory as a whole.

Legend: B windows, S tokens, E hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from ...conversion.io.open_checkpoint import OpenedCheckpoint
from ...modeling_indexcache.forward_plan import ForwardPlan
from ...modeling_indexcache.model_outputs import IndexCacheModelOutput
from ...modeling_indexcache.selection import EVERY_KEY
from ..errors import RunError
from ..fingerprint import sha256_of_prints, tensor_print
from ..loading import Placement, dtype_and_device
from .layer_source import LayerSource

Job = tuple[str, torch.Tensor]


class StreamedForwards:
    """Runs a layer source's model, layer by layer over all forwards that are expected.

    Args:
        source: of the layers; its model runs so from now on.
        room: bytes for the states of forwards that run side by side; at least one runs.
    """

    def __init__(self, source: LayerSource, room: int) -> None:
        self.source, self.room = source, room
        self._expected: dict[tuple[str, bytes], torch.Tensor] = {}
        self._done: dict[tuple[str, bytes], torch.Tensor] = {}
        decoder: Any = source.model.model
        decoder.forward = self._forward

    def expect(self, jobs: Iterable[Job]) -> None:
        """Say which forwards come next, as patterns' letters and tokens `[B, S]`, in place of those said before.

        The next forward that has not run takes those behind it along, as many as there is room for.
        """
        self._expected = {_key(letters, ids): ids for letters, ids in jobs}

    def _forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> IndexCacheModelOutput:
        if torch.is_grad_enabled() or use_cache:
            raise RunError("a model that is streamed runs whole windows, without a cache and without gradients")
        decoder: Any = self.source.model.model
        key = _key(decoder._running_pattern.letters, input_ids)
        if key not in self._done:
            self._expected = {key: input_ids, **{other: ids for other, ids in self._expected.items() if other != key}}
            self._sweep()
        return IndexCacheModelOutput(last_hidden_state=self._done.pop(key))

    def _sweep(self) -> None:
        """Run the first of those expected, as many as there is room for."""
        decoder: Any = self.source.model.model
        jobs: list[tuple[tuple[str, bytes], torch.Tensor]] = []
        bytes_left = self.room
        for key, ids in list(self._expected.items()):
            bytes_left -= self._state_bytes(ids)
            if jobs and bytes_left < 0:
                break
            del self._expected[key]
            jobs.append((key, decoder.embed_tokens(ids.to(self.source.device))))
        pattern = decoder._running_pattern
        plans = []
        try:
            for (letters, _), hidden in jobs:
                self.source.model.set_index_share_pattern(letters)
                plans.append(ForwardPlan.of(decoder, hidden))
        finally:
            decoder._running_pattern = pattern
        states = [(hidden, EVERY_KEY) for _, hidden in jobs]
        keys = [key for key, _ in jobs]
        del jobs, hidden
        for layer in self.source.sweep():
            for number, plan in enumerate(plans):
                hidden, selection = states[number]
                states[number] = (hidden, EVERY_KEY)
                hidden, selection, _ = plan.run(decoder, hidden, selection, layer, layer + 1)
                states[number] = hidden, selection
        for key, (hidden, _) in zip(keys, states):
            self._done[key] = decoder.norm(hidden)

    def _state_bytes(self, ids: torch.Tensor) -> int:
        """Of hidden values, of the next layer's beside them, and of a selection."""
        config = self.source.model.config
        size = self.source.model.dtype.itemsize
        return ids.numel() * (2 * config.hidden_size * size + 4 * (config.index_topk or 0))


def stream_model(opened: OpenedCheckpoint, placement: Placement) -> LayerSource:
    """The layer source of a checkpoint, as `load_model` would place the model.

    Raises:
        RunError: a placement over several devices.
        ConversionError: as `load_source`.
    """
    if placement.device_map or placement.tensor_parallel:
        raise RunError("--stream runs on one device: leave out --device-map and --parallel tensor")
    dtype, device = dtype_and_device(placement)
    return LayerSource(opened, dtype=dtype, device=device, token=placement.token)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, or on this machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def streamed_sha256(source: LayerSource, while_running: Any = None) -> str:
    """`model_sha256` of the model, from one sweep.

    Args:
        source: of the layers.
        while_running: called without arguments: work that sweeps over all layers, whose weights are seen on the way.
    """
    prints: dict[str, list[bytes]] = {}

    def look(number: int, layer: torch.nn.Module) -> None:
        for name, tensor in layer.state_dict(prefix=f"model.layers.{number}.").items():
            if name not in prints:
                prints[name] = tensor_print(name, tensor)

    source.watchers.append(look)
    try:
        if while_running is not None:
            while_running()
        seen = {int(name.split(".")[2]) for name in prints}
        for _ in source.sweep([number for number in range(source.num_layers) if number not in seen]):
            pass
    finally:
        source.watchers.remove(look)
    for name, tensor in source.model.state_dict().items():
        if name not in prints:
            prints[name] = tensor_print(name, tensor)
    return sha256_of_prints(source.model, prints)


def _key(letters: str, ids: torch.Tensor) -> tuple[str, bytes]:
    return letters, f"{tuple(ids.shape)}".encode() + ids.long().cpu().contiguous().numpy().tobytes()
