"""Decoding steps as one CUDA graph, so that `generate` as it stands is not bound by Python.

A step of one token runs the same kernels on the same memory every time but for the position, which kernels read on
the device. A static cache's memory stands still by design; a dynamic cache's buffers do between the rare times when
they are full (`growing_cache.py`). The layers are captured once, over the whole length of that memory, and replayed.
Nothing is compiled, so a first token costs three slow steps, not minutes. Whatever is out of the ordinary (hooks,
wanted attentions, beams that reorder the cache, several devices) runs step by step as before.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicIndexedLayer, StaticCache, StaticIndexedLayer

from ..kernels.cache_slot import CacheSlot
from ..kernels.early_launch import early_launches
from ..kernels.kernel_launch import are_recorded, is_capturing
from .attention_backends import TRITON_ATTENTION
from .feed_forward import runs_expert_kernels
from .growing_cache import Buffer, buffer_of
from .key_visibility import KeyVisibility
from .module_hooks import hooks_of, is_foreign

# Steps in a row that must have found a cache where it was before it is captured.
STEPS_BEFORE_CAPTURE = 2
_ATTRIBUTE = "_indexcache_decode_graph"
_ROWS = ("keys", "indexer_keys")
_OUTPUTS = ("hidden_states", "attentions", "router_logits", "topk_indices")


class StepInputs(NamedTuple):
    """Hidden states `[B, 1, hidden_size]`, position ids `[B or 1, 1]` and mask `[B, tokens]` of a step."""

    hidden_states: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None


class _Watch(NamedTuple):
    """A cache's memory at the last step, and for how many steps it has been there."""

    steps: int
    memory: tuple[int, ...] | None


class _BufferLayer:
    """One layer's memory as a layer of fixed length, written at a position that the device knows."""

    def __init__(self, keys: torch.Tensor, indexer_keys: torch.Tensor | None, position: torch.Tensor) -> None:
        self.keys, self.indexer_keys, self.position = keys, indexer_keys, position

    def slot(self) -> CacheSlot:
        return CacheSlot(self.keys.squeeze(1), self.position)

    def indexer_slot(self) -> CacheSlot:
        assert self.indexer_keys is not None
        return CacheSlot(self.indexer_keys, self.position)


class _BufferCache:
    """What the layers see of a cache while they are captured."""

    def __init__(self, layers: list[_BufferLayer]) -> None:
        self.layers = layers


class DecodeGraph:
    """One captured step for one cache.

    Belongs to the cache that it was made for: copies of the cache carry it along and do not use it.
    """

    def __init__(self, model: Any, cache: Any, inputs: StepInputs) -> None:
        self.cache = weakref.ref(cache)
        self.is_static = isinstance(cache, StaticCache)
        self.circumstances = _circumstances(model, inputs)
        hidden_states = inputs.hidden_states
        device, batch = hidden_states.device, hidden_states.shape[0]
        self.hidden_states = torch.empty_like(hidden_states)
        self.position_ids = None if inputs.position_ids is None else torch.zeros_like(inputs.position_ids)
        #: Of a dynamic cache: its buffers, the rows in them, and the place of the next one on the device.
        self.buffers: list[dict[str, Buffer]] = []
        self.length, self.position = 0, torch.zeros(1, dtype=torch.int64, device=device)
        self.lengths: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self.is_static:
            self.lengths = [(t, t.clone()) for layer in cache.layers for t in _static_lengths(layer)]
            self.capacity = cache.get_max_length()
        else:
            self.buffers = [_buffers(layer) for layer in cache.layers]
            self.capacity = min(buffer.rows.shape[-2] for buffers in self.buffers for buffer in buffers.values())
            self.length = cache.get_seq_length()
        self.key_mask = None
        if inputs.attention_mask is not None:
            self.key_mask = torch.ones(batch, self.capacity, dtype=torch.bool, device=device)
        self.out: torch.Tensor | None = None
        self.replay: Callable[[], None] | None = None
        self.tensors = _tensors(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()

    def serves(self, model: Any, cache: Any, inputs: StepInputs) -> bool:
        """Whether the next step may be replayed: nobody touched the cache or the model since the last one."""
        mask = inputs.attention_mask
        return (
            self.cache() is cache
            and (self.is_static or self.length < self.capacity)
            and (mask is None or mask.shape[1] <= self.capacity)
            and self.circumstances == _circumstances(model, inputs)
            and all(now is then for now, then in zip(_tensors(cache), self.tensors, strict=True))
        )

    def capture(self, run_layers: Any, inputs: StepInputs) -> None:
        """Run the step once as it is and once to record it; both write what a replay writes."""
        self._load(inputs)
        rows: list[tuple[torch.Tensor, torch.Tensor | None]]
        if self.is_static:
            found: Any = self.cache()
            rows = [(layer.keys, layer.indexer_keys) for layer in found.layers]
        else:
            rows = [(own["keys"].rows, own["indexer_keys"].rows if len(own) > 1 else None) for own in self.buffers]
        cache = _BufferCache([_BufferLayer(*pair, self.position) for pair in rows])
        # A static cache counts its rows on the device, each layer for itself and all alike.
        lengths = [length for length, _ in self.lengths]
        if lengths and len(set(torch.stack(lengths).tolist())) > 1:
            raise RuntimeError("layers of the static cache hold different numbers of rows")

        def run() -> torch.Tensor:
            if lengths:
                self.position.copy_(lengths[0])
            visibility = KeyVisibility(self.position.squeeze(0), self.key_mask)
            out = run_layers(self.hidden_states, self.position_ids, visibility, cache)
            if lengths:
                torch._foreach_add_(lengths, 1)
            return out

        self.out, self.replay = record(run, self.rewind, self.hidden_states.device)

    def rewind(self) -> None:
        """Take back the steps since this object was made, which a static cache counts on the device."""
        for length, earlier in self.lengths:
            length.copy_(earlier)

    def step(self, inputs: StepInputs) -> torch.Tensor:
        """Replay the step; a dynamic cache's layers then show the row more that they hold."""
        assert self.out is not None
        assert self.replay is not None
        self._load(inputs)
        self.replay()
        if not self.is_static:
            self._show_row()
        return self.out.clone()

    def _show_row(self) -> None:
        cache: Any = self.cache()
        tensors: list[torch.Tensor] = []
        self.length += 1
        for layer, buffers in zip(cache.layers, self.buffers):
            for name, buffer in buffers.items():
                buffer.filled = self.length
                view = buffer.rows.narrow(-2, 0, self.length)
                setattr(layer, name, view)
                tensors.append(view)
            layer.values = layer.keys[..., :0]
        self.tensors = tensors

    def _load(self, inputs: StepInputs) -> None:
        self.hidden_states.copy_(inputs.hidden_states)
        self.position.fill_(self.length)
        if self.position_ids is not None and inputs.position_ids is not None:
            self.position_ids.copy_(inputs.position_ids)
        if self.key_mask is not None and inputs.attention_mask is not None:
            self.key_mask[:, : inputs.attention_mask.shape[1]].copy_(inputs.attention_mask)


def record(
    run: Callable[[], torch.Tensor], rewind: Callable[[], None], device: torch.device
) -> tuple[torch.Tensor, Callable[[], None]]:
    """Run once to warm up, rewind, then capture: the tensor that holds the result, and what makes it anew."""
    if are_recorded():
        with early_launches(device):
            return run(), lambda: None
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with early_launches(device):
        with torch.cuda.stream(side):
            run()
            rewind()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            out = run()
    return out, graph.replay


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device for all recordings: cuBLAS keeps a workspace of 32 MiB for every stream it has seen."""
    return torch.cuda.Stream(device)


def decode_graph(
    model: Any,
    run_layers: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """The step's last hidden states `[B, 1, hidden_size]` from a graph, or None: run it step by step.

    Args:
        model: the decoder.
        run_layers: `(hidden_states, position_ids, visibility, cache) -> hidden states`, what is captured.
        hidden_states: embedded tokens.
        attention_mask: as `forward` was given it.
        position_ids: as `forward` was given it.
        cache: as `forward` was given it.
        kwargs: of `forward`.
    """
    if not _ordinary(model, hidden_states, attention_mask, cache, kwargs):
        return None
    assert cache is not None
    inputs = StepInputs(hidden_states, position_ids, attention_mask)
    known = vars(cache).get(_ATTRIBUTE)
    if isinstance(known, DecodeGraph):
        if known.serves(model, cache, inputs):
            return known.step(inputs)
        known = None
    if known is False:
        return None
    # Steps in a row for which the cache's memory stood still.
    memory = _memory(cache)
    steps = known.steps + 1 if isinstance(known, _Watch) and known.memory == memory else 0
    setattr(cache, _ATTRIBUTE, _Watch(steps, memory))
    if memory is None or steps < STEPS_BEFORE_CAPTURE or not _capturable(model, hidden_states):
        return None
    graph = DecodeGraph(model, cache, inputs)
    try:
        graph.capture(run_layers, inputs)
    except RuntimeError as error:
        graph.rewind()
        setattr(cache, _ATTRIBUTE, False)
        warnings.warn(f"decoding runs step by step, a CUDA graph could not be made: {error}", stacklevel=2)
        return None
    setattr(cache, _ATTRIBUTE, graph)
    return graph.step(inputs)


def graphs_serve(model: Any) -> bool:
    """Whether decoding steps of this decoder can come from graphs, as it stands now."""
    one = model.embed_tokens.weight[:1].detach().unsqueeze(0)
    has_indexers = model.config.index_topk is not None
    return model.decode_graphs and has_indexers and _device_takes_graphs(one) and _capturable(model, one)


def _ordinary(
    model: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> bool:
    """Whether this is a plain decoding step, seen from the outside; cheap, asked at every step."""
    config = model.config
    return (
        not torch.compiler.is_compiling()
        and hidden_states.shape[1] == 1
        and model.decode_graphs
        and _device_takes_graphs(hidden_states)
        and type(cache) in (DynamicCache, StaticCache)
        and not cache.offloading
        and len(cache.layers) == config.num_hidden_layers
        and not model.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and config.index_topk is not None
        and (attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2))
        and not any(kwargs.get(f"output_{name}", getattr(config, f"output_{name}", False)) for name in _OUTPUTS)
        and kwargs.get("indexer_training") is None
    )


def _device_takes_graphs(hidden_states: torch.Tensor) -> bool:
    return hidden_states.is_cuda and not is_capturing(hidden_states)


def _memory(cache: Any) -> tuple[int, ...] | None:
    """Addresses of what every layer writes its next row to, or None where that is new memory."""
    addresses = []
    for layer in cache.layers:
        if type(layer) not in (DynamicIndexedLayer, StaticIndexedLayer) or layer.keys is None:
            return None
        for name, tensor in zip(_ROWS, (layer.keys, layer.indexer_keys)):
            if tensor is None:
                continue
            grows = type(layer) is DynamicIndexedLayer
            if grows and buffer_of(layer, name, tensor, tensor.shape[-2] + 1) is None:
                return None
            addresses.append(tensor.data_ptr())
    return tuple(addresses)


def _capturable(model: Any, hidden_states: torch.Tensor) -> bool:
    """Whether the layers run the same kernels at every step; looks at every module, asked once a cache."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    if model.config._attn_implementation != TRITON_ATTENTION:
        return False
    for module in model.modules():
        if "forward" in vars(module) or any(map(is_foreign, hooks_of(module))):
            return False
    sparse = [layer.mlp for layer in model.layers if hasattr(layer.mlp, "experts")]
    tokens = hidden_states.view(-1, hidden_states.shape[-1])
    return all(runs_expert_kernels(mlp, tokens) for mlp in sparse) and all(
        parameter.device == hidden_states.device for parameter in model.layers.parameters()
    )


def _circumstances(model: Any, inputs: StepInputs) -> tuple[Any, ...]:
    """What a captured step depends on besides the cache."""
    hidden_states = inputs.hidden_states
    return (
        weakref.ref(model),
        model._running_pattern,
        model.config._attn_implementation,
        model.config._experts_implementation,
        model.config.indexer_fp8,
        hidden_states.shape,
        hidden_states.dtype,
        hidden_states.device,
        None if inputs.position_ids is None else inputs.position_ids.shape,
        inputs.attention_mask is None,
        model.layers[0].input_layernorm.weight.data_ptr(),
        torch.is_inference_mode_enabled(),
    )


def _buffers(layer: Any) -> dict[str, Buffer]:
    found = {}
    for name in _ROWS:
        tensor = getattr(layer, name)
        if tensor is not None:
            buffer = buffer_of(layer, name, tensor, tensor.shape[-2] + 1)
            assert buffer is not None
            found[name] = buffer
    return found


def _tensors(cache: Any) -> list[torch.Tensor]:
    pairs = ((layer.keys, layer.indexer_keys) for layer in cache.layers)
    return [tensor for pair in pairs for tensor in pair if tensor is not None]


def _static_lengths(layer: Any) -> list[torch.Tensor]:
    return [t for t in (layer.cumulative_length, layer.indexer_cumulative_length) if t is not None]
