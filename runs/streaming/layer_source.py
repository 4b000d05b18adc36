"""A checkpoint's decoder layers one after the other, the next one being read while one runs.

Beside the layer in use and the one on its way only embeddings, last norm and head have memory. A layer is what a
resident load makes of it: the same modules, weights and dtypes, block fp8 as it is stored.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig

from ...conversion.io.checkpoint import TensorInfo
from ...conversion.io.fp8 import is_fp8
from ...conversion.io.load_source import where_to_load
from ...conversion.io.open_checkpoint import OpenedCheckpoint
from ...conversion.io.sources import ConversionError
from ...modeling_indexcache.block_fp8_loading import E4M3_NAME, Stored, stored_scales
from ...modeling_indexcache.layers.block_fp8_modules import put_block_fp8
from ...modeling_indexcache.layers.expert_router import IndexCacheTopkRouter
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ..errors import RunError
from ..loading import Placement, dtype_and_device
from .shard_reader import ShardReader

_LAYERS = "model.layers."
# Stacked experts by the parts that a checkpoint stores of each: gate above up.
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass
class Reading:
    """What a source has read so far.

    Attributes:
        sweeps: passes over layers that were begun.
        layers: layers read.
        nbytes: bytes read of layers.
        seconds_reading: from a layer's first byte to its being on the device, summed; beside the layers' work.
        seconds_waited: of these, how long a layer that was due kept its user waiting.
    """

    sweeps: int = 0
    layers: int = 0
    nbytes: int = 0
    seconds_reading: float = 0.0
    seconds_waited: float = 0.0


class LayerSource:
    """The layers of a checkpoint that was found whole.

    Attributes:
        model: a model in evaluation mode whose layers are on `meta`, but for those in use; the rest is on `device`.
        reading: what was read.
        location: of the checkpoint, as messages name it.

    Args:
        opened: of `open_checkpoint`.
        dtype: of weights that are not quantised, as `from_pretrained` takes it.
        device: where layers run.
        attention: `attn_implementation`; None for the best that this machine runs.

    Raises:
        ConversionError: weights quantised otherwise than by block fp8.
    """

    def __init__(
        self,
        opened: OpenedCheckpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        attention: str | None = None,
    ) -> None:
        self.device, self.dtype, self.reading = torch.device(device), dtype, Reading()
        self._tensors = opened.checkpoint.tensors
        self.location = opened.source.location
        quantisation = opened.fields.get("quantization_config")
        if quantisation is not None and not (is_fp8(opened.fields) and not quantisation.get("dequantize")):
            raise ConversionError(
                f"{self.location}: layers can be streamed of block fp8 and of weights that are not quantised: "
                "load this checkpoint whole, without --stream"
            )
        self._folder = Path(where_to_load(opened.source))
        self.model = _skeleton(opened, dtype, attention)
        self._plan = self.model._get_dtype_plan(dtype)
        self._skeletons = list(self.model.model.layers)
        self._loader = ThreadPoolExecutor(1, "layer-loader")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._reader = ShardReader(self._folder, self.location, self._stream)
        self._put_the_rest()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._skeletons)

    def layers(self, first: int = 0, last: int | None = None) -> Iterator[int]:
        """Put layers `first` to `last` in place one after the other: the number of each while it is there.

        The next one is read meanwhile. A layer is gone when the next number is asked for.
        """
        return self.visit(range(first, self.num_layers if last is None else last))

    def visit(self, order: Any) -> Iterator[int]:
        """As `layers`, in any order of layers' numbers."""
        order = list(order)
        if not order:
            return
        self.reading.sweeps += 1
        coming: Future[nn.Module] = self._loader.submit(self._load, order[0])
        try:
            for place, layer in enumerate(order):
                begun = time.monotonic()
                made = coming.result()
                self.reading.seconds_waited += time.monotonic() - begun
                if place + 1 < len(order):
                    coming = self._loader.submit(self._load, order[place + 1])
                self.model.model.layers[layer] = made
                try:
                    yield layer
                finally:
                    if self._stream is not None:
                        # Memory that is given up is taken at once by the layer on its way, whose copies wait for the
                        # reader's stream alone: this layer's work must be done before, not only queued.
                        torch.cuda.current_stream(self.device).synchronize()
                    self.model.model.layers[layer] = self._skeletons[layer]
                    del made
        finally:
            coming.cancel()

    def state_items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The name and value of everything in the model's state dict, sorted by name; every layer is read once."""
        rest = {name: value for name, value in self.model.state_dict().items() if not name.startswith(_LAYERS)}
        before, behind = (sorted(name for name in rest if (name > _LAYERS) == late) for late in (False, True))
        yield from ((name, rest[name]) for name in before)
        for layer in self.visit(sorted(range(self.num_layers), key=lambda layer: f"{layer}.")):
            state = self.model.model.layers[layer].state_dict(prefix=f"{_LAYERS}{layer}.")
            yield from sorted(state.items())
            del state
        yield from ((name, rest[name]) for name in behind)

    def close(self) -> None:
        """End the readers and close the files."""
        self._loader.shutdown(cancel_futures=True)
        self._reader.close()

    # ---- making modules ---------------------------------------------------------------------------------------------

    def _put_the_rest(self) -> None:
        model = self.model
        with torch.no_grad():
            # Of frequencies, which no checkpoint holds.
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(self.device)
        for name, module in (("model.embed_tokens", model.model.embed_tokens), ("model.norm", model.model.norm)):
            self._fill(module, name)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        else:
            self._fill(model.lm_head, "lm_head")
        self.reading = Reading()

    def _load(self, layer: int) -> nn.Module:
        begun = time.monotonic()
        made: nn.Module = copy.deepcopy(self._skeletons[layer])
        self._fill(made, f"{_LAYERS}{layer}")
        self.reading.layers += 1
        self.reading.seconds_reading += time.monotonic() - begun
        return made

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module on `meta` its weights, in memory of the reader's stream."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            wanted: list[tuple[TensorInfo, torch.Tensor]] = []
            routers: list[IndexCacheTopkRouter] = []
            for place, part in module.named_modules(prefix=prefix):
                for name, empty in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                    pieces = self._pieces(place, name)
                    value = torch.empty(
                        empty.shape, dtype=self._dtype_of(f"{place}.{name}", empty), device=self.device
                    )
                    wanted += _targets(pieces, value)
                    if isinstance(empty, nn.Parameter):
                        part.register_parameter(name, nn.Parameter(value, requires_grad=empty.requires_grad))
                    else:
                        part.register_buffer(name, value)
                if isinstance(part, IndexCacheTopkRouter):
                    routers.append(part)
            # Writing into parameters is no step that a gradient would want to know of.
            with torch.no_grad():
                self.reading.nbytes += self._reader.fill(wanted)
            for router in routers:
                router.store_exactly(self.dtype)
            if self._stream is not None:
                self._stream.synchronize()

    def _pieces(self, place: str, name: str) -> list[list[TensorInfo]]:
        """The stored tensors of a parameter: one, or for each expert those that lie one above the other."""
        stored = self._tensors.get(f"{place}.{name}")
        if stored is not None:
            return [[stored]]
        kind, scales = (name.removesuffix("_scale_inv"), name.endswith("_scale_inv"))
        found: list[list[TensorInfo]] = []
        for part in _STACKED.get(kind, ()):
            suffix = f"{part}.weight" + ("_scale_inv" if scales else "")
            column: list[TensorInfo] = []
            while (stored := self._tensors.get(f"{place}.{len(column)}.{suffix}")) is not None:
                column.append(stored)
            found.append(column)
        if not found or not found[0]:
            raise ConversionError(f"{self.location} lacks {place}.{name}: fetch it again")
        return [list(parts) for parts in zip(*found, strict=True)]

    def _dtype_of(self, name: str, empty: torch.Tensor) -> torch.dtype:
        """What `from_pretrained` makes of it."""
        if empty.dtype.itemsize == 1 or name.endswith("_scale_inv"):
            return empty.dtype
        if any(re.search(re.escape(kept), name) for kept in self._plan):
            return torch.float32
        return empty.dtype


def _targets(pieces: list[list[TensorInfo]], value: torch.Tensor) -> list[tuple[TensorInfo, torch.Tensor]]:
    """The part of a parameter that each of its stored tensors is."""
    if len(pieces) == 1 and tuple(pieces[0][0].shape) == tuple(value.shape):
        return [(pieces[0][0], value.data)]
    found = []
    for expert, parts in enumerate(pieces):
        row = 0
        for part in parts:
            found.append((part, value.data[expert, row : row + part.shape[0]]))
            row += part.shape[0]
    return found


def stream_model(opened: OpenedCheckpoint, placement: Placement) -> LayerSource:
    """A source whose layers are those of `load_model` with this placement.

    Raises:
        RunError: a placement on several devices.
        ConversionError: as `LayerSource`.
    """
    if placement.device_map or placement.tensor_parallel:
        raise RunError("--stream runs on one device: leave --device-map and --parallel out, or leave --stream out")
    return LayerSource(opened, *dtype_and_device(placement))


def stream_layers(opened: OpenedCheckpoint, dtype: torch.dtype, device: torch.device | str) -> closing[LayerSource]:
    """A `LayerSource` for a `with` statement."""
    return closing(LayerSource(opened, dtype, device))


def _skeleton(opened: OpenedCheckpoint, dtype: torch.dtype, attention: str | None) -> IndexCacheForCausalLM:
    """The model on `meta`, with block fp8 modules where the checkpoint's files hold fp8."""
    config = copy.deepcopy(opened.config)
    config.dtype = dtype
    with torch.device("meta"):
        make: Any = IndexCacheForCausalLM._from_config
        model: IndexCacheForCausalLM = make(config, dtype=dtype, attn_implementation=attention)
    stored = {name: Stored(info.dtype, info.shape) for name, info in opened.checkpoint.tensors.items()}
    if any(found.dtype == E4M3_NAME for found in stored.values()):
        size = opened.fields["quantization_config"].get("weight_block_size", [128, 128])

        def scale_dtype(name: str, is_experts: bool) -> torch.dtype | None:
            kind = stored_scales(name, stored, model.base_model_prefix, is_experts)
            return None if kind is None else torch.float32 if kind == "F32" else torch.float8_e8m0fnu

        put_block_fp8(model, (int(size[0]), int(size[1])), scale_dtype)
    if opened.fields.get("quantization_config") is not None:
        # As loading leaves it: a model is known by its config, too.
        given = AutoQuantizationConfig.from_dict(copy.deepcopy(opened.fields["quantization_config"]))
        given.fmt = "e4m3"
        model.config.quantization_config = given
    return model.eval()  # type: ignore[no-untyped-call,no-any-return]
