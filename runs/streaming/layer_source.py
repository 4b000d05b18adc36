"""The layers of a checkpoint one after the other, the next one on its way while one runs.

A model whose layers have no memory (`meta`) stands for the whole; its embeddings, last norm and head are here. A sweep
puts each layer's weights in place, in the dtypes and stacked as `load_source` has them, and takes them away again:
two layers' weights are in memory at most, the one that runs and the one that is read.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ...conversion.io.checkpoint import TensorInfo
from ...conversion.io.load_source import load_source, where_to_load
from ...conversion.io.open_checkpoint import OpenedCheckpoint
from ...modeling_indexcache.layers.expert_router import IndexCacheTopkRouter
from ...modeling_indexcache.layers.rotary_embedding import IndexCacheRotaryEmbedding
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ..errors import RunError
from .shard_reader import DTYPES, ShardReader

# Parts of the experts' stacked weights, by the end of their name: the names of what is stacked, one above the other.
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_SCALES = "_scale_inv"


class LayerSource:
    """A checkpoint's layers, in any order, each put into the model for as long as it is wanted.

    Args:
        opened: the checkpoint, found whole.
        dtype: of what is not kept in another one, as for `from_pretrained`.
        device: where layers run.
        **arguments: for `load_source`, such as `attn_implementation`, `token`.

    Attributes:
        model: in evaluation mode; between sweeps its layers are on `meta`.
        layers_read: layers put in place so far.
        alive, most_alive: layers whose weights are in memory now, and at most so far.
        seconds_waited: spent waiting for layers that were not there yet.
        sweeps: begun so far.
        watchers: called with every layer's number and the layer, when it is in place.

    Raises:
        ConversionError: as `load_source`.
        RunError: weights stored in a way that only the whole model can be loaded from.
    """

    def __init__(
        self, opened: OpenedCheckpoint, *, dtype: torch.dtype, device: torch.device | str, **arguments: Any
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        # Loaded onto no memory: the loader's own checks, modules and dtypes.
        self.model: IndexCacheForCausalLM = load_source(opened, dtype=dtype, device_map="meta", **arguments)
        self.model.eval()  # type: ignore[no-untyped-call]
        self._tensors = opened.checkpoint.tensors
        self._location = opened.source.location
        self._reader = ShardReader(where_to_load(opened.source), self.device)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="layer-source")
        decoder: Any = self.model.model
        self._empty: list[Any] = list(decoder.layers)
        self.layers_read = self.alive = self.most_alive = self.sweeps = 0
        self.seconds_waited = 0.0
        self.watchers: list[Callable[[int, nn.Module], None]] = []
        self._fill_root()

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self._empty)

    @property
    def bytes_read(self) -> int:
        """From the shards, so far."""
        return self._reader.bytes_read

    def layer_bytes(self) -> int:
        """Of the largest layer's weights in memory."""
        sizes: list[int] = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in self._empty]
        return max(sizes)

    def record(self) -> dict[str, Any]:
        """What streaming took so far, as JSON values."""
        return {
            "sweeps": self.sweeps,
            "layers_read": self.layers_read,
            "bytes_read": self.bytes_read,
            "seconds_waited": round(self.seconds_waited, 2),
        }

    def close(self) -> None:
        """Stop reading; the model has no layers any more."""
        self._ahead.shutdown()
        self._reader.close()

    def sweep(self, order: Iterable[int] | None = None) -> Iterator[int]:
        """Yield the number of each layer while it is in place.

        Args:
            order: of the layers; all, the first one first, when None.

        Raises:
            ConversionError: a shard that cannot be read any more.
        """
        wanted = list(range(self.num_layers) if order is None else order)
        if not wanted:
            return
        self.sweeps += 1
        decoder: Any = self.model.model
        pending: Future[nn.Module] | None = self._begin(wanted[0])
        try:
            for place, number in enumerate(wanted):
                assert pending is not None
                begun = time.monotonic()
                layer = pending.result()
                self.seconds_waited += time.monotonic() - begun
                self._hand_over(layer)
                decoder.layers[number] = layer
                self.layers_read += 1
                for watch in self.watchers:
                    watch(number, layer)
                pending = self._begin(wanted[place + 1]) if place + 1 < len(wanted) else None
                del layer
                try:
                    yield number
                finally:
                    self._take_away(number)
        finally:
            # Left early: what is on its way is let go.
            if pending is not None and not pending.exception():
                self.alive -= 1

    # ---- one layer ----------------------------------------------------------------------------------------------

    def _begin(self, number: int) -> Future[nn.Module]:
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        return self._ahead.submit(self._make, number)

    def _make(self, number: int) -> nn.Module:
        """The layer with its weights on the device."""
        empty = self._empty[number]
        # A copy, so that nothing that a module keeps of its weights outlives them; the config stays the model's.
        layer: nn.Module = copy.deepcopy(empty, {id(self.model.config): self.model.config})
        stream = self._reader.stream
        with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
            self._fill(layer, f"model.layers.{number}.", {})
            for module in layer.modules():
                if isinstance(module, IndexCacheTopkRouter):
                    module.store_exactly(self.model.dtype)
            if stream is not None:
                stream.synchronize()
        return layer

    def _hand_over(self, layer: nn.Module) -> None:
        """The computing stream uses what another one has written: its memory is given back no earlier than that."""
        if self._reader.stream is not None:
            current = torch.cuda.current_stream(self.device)
            for tensor in layer.state_dict(keep_vars=True).values():
                tensor.data.record_stream(current)

    def _take_away(self, number: int) -> None:
        decoder: Any = self.model.model
        if self._reader.stream is not None:
            # Else the memory of a layer that is still running would be held while the one after next is read.
            torch.cuda.current_stream(self.device).synchronize()
        decoder.layers[number] = self._empty[number]
        self.alive -= 1

    # ---- weights ------------------------------------------------------------------------------------------------

    def _fill_root(self) -> None:
        decoder: Any = self.model.model
        decoder.rotary_emb = IndexCacheRotaryEmbedding(self.model.config).to(self.device)
        stream = self._reader.stream
        with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
            made: dict[int, nn.Parameter] = {}
            for name, part in (("model.embed_tokens.", decoder.embed_tokens), ("model.norm.", decoder.norm)):
                self._fill(part, name, made)
            self._fill(self.model.lm_head, "lm_head.", made)
        if stream is not None:
            stream.synchronize()

    def _fill(self, module: nn.Module, prefix: str, made: dict[int, nn.Parameter]) -> None:
        """Give a module on `meta` its weights; `made` are parameters that are there already, by those on `meta`."""
        wanted: list[tuple[TensorInfo, torch.Tensor]] = []
        for name, empty in module.state_dict(keep_vars=True).items():
            owner, _, leaf = name.rpartition(".")
            part: Any = module.get_submodule(owner)
            if id(empty) in made:
                part._parameters[leaf] = made[id(empty)]
                continue
            full = torch.empty(empty.shape, dtype=empty.dtype, device=self.device)
            wanted += self._parts(prefix + name, full)
            if leaf in part._parameters:
                part._parameters[leaf] = made[id(empty)] = nn.Parameter(full, requires_grad=empty.requires_grad)
            else:
                part._buffers[leaf] = full
        self._reader.fill(wanted)

    def _parts(self, name: str, full: torch.Tensor) -> list[tuple[TensorInfo, torch.Tensor]]:
        """The checkpoint's tensors that make up one of the model's, with the part of it that each is."""
        if name in self._tensors:
            return [(self._checked(name, full), full)]
        owner, _, leaf = name.rpartition(".")
        stem = leaf.removesuffix(_SCALES)
        if stem not in _STACKED:
            raise RunError(f"{self._location} holds no {name}: it cannot be streamed; run without --stream")
        found = []
        suffix = ".weight" + (_SCALES if leaf.endswith(_SCALES) else "")
        for expert, whole in enumerate(full):
            stacked = whole.chunk(len(_STACKED[stem]))
            for part, target in zip(_STACKED[stem], stacked):
                found.append((self._checked(f"{owner}.{expert}.{part}{suffix}", target), target))
        return found

    def _checked(self, name: str, target: torch.Tensor) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None or info.dtype not in DTYPES or info.shape != tuple(target.shape):
            held = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise RunError(
                f"{self._location}: {name} is {held}, which cannot be streamed into {list(target.shape)}: "
                "run without --stream"
            )
        return info
