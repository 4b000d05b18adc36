"""Decoding steps of a dynamic cache as one CUDA graph, so that `generate` as it stands is not bound by Python.

A step of one token runs the same kernels on the same buffers every time but for the position, which kernels read on
the device. When a dynamic cache has grown in place for a few steps (`growing_cache.py`), its buffers stand still until
they are full: the layers are then captured once, over the buffers' whole length, and replayed. Whatever is out of the
ordinary (hooks, wanted attentions, beams that reorder the cache, several devices) runs step by step as before.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicIndexedLayer

from .attention_backends import TRITON_ATTENTION
from .feed_forward import runs_expert_kernels
from .growing_cache import Buffer, buffer_of
from .key_visibility import KeyVisibility

# Steps in a row that must have grown a cache in place before it is captured.
STEPS_BEFORE_CAPTURE = 2
_ATTRIBUTE = "_indexcache_decode_graph"
_OUTPUTS = ("hidden_states", "attentions", "router_logits", "topk_indices")


class _BufferLayer:
    """One layer's buffers as a layer of fixed length, written at a position that the device knows."""

    def __init__(self, buffers: dict[str, Buffer], position: torch.Tensor) -> None:
        self.keys = buffers["keys"].rows
        self.indexer_keys = buffers["indexer_keys"].rows if "indexer_keys" in buffers else None
        self.position = position

    def update(self, rows: torch.Tensor) -> torch.Tensor:
        return self.keys.index_copy_(2, self.position, rows)

    def update_indexer(self, rows: torch.Tensor) -> torch.Tensor:
        assert self.indexer_keys is not None
        return self.indexer_keys.index_copy_(1, self.position, rows)


class _BufferCache:
    """What the layers see of a cache while they are captured."""

    offloading = False

    def __init__(self, layers: list[_BufferLayer]) -> None:
        self.layers = layers

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[layer_idx].update(keys), values

    def update_indexer(self, rows: torch.Tensor, layer_idx: int) -> torch.Tensor:
        return self.layers[layer_idx].update_indexer(rows)


class DecodeGraph:
    """One captured step for one cache.

    Belongs to the cache that it was made for: copies of the cache carry it along and do not use it.
    """

    def __init__(self, model: Any, cache: Cache, hidden_states: torch.Tensor, masked: bool) -> None:
        self.cache = weakref.ref(cache)
        self.buffers = [_buffers(layer) for layer in cache.layers]
        self.circumstances = _circumstances(model, hidden_states, masked)
        device, batch = hidden_states.device, hidden_states.shape[0]
        self.length = cache.get_seq_length()
        self.capacity = min(buffer.rows.shape[-2] for buffers in self.buffers for buffer in buffers.values())
        self.hidden_states = torch.empty_like(hidden_states)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.position_ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.key_mask = torch.ones(batch, self.capacity, dtype=torch.bool, device=device) if masked else None
        self.out: torch.Tensor | None = None
        self.replay: Callable[[], None] | None = None
        self.views: list[torch.Tensor] = [tensor for layer in cache.layers for tensor in _tensors(layer)]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()

    def serves(self, model: Any, cache: Cache, hidden_states: torch.Tensor, masked: bool) -> bool:
        """Whether the next step may be replayed: nobody touched the cache or the model since the last one."""
        return (
            self.cache() is cache
            and self.length < self.capacity
            and self.circumstances == _circumstances(model, hidden_states, masked)
            and all(now is then for now, then in zip(_all_tensors(cache), self.views, strict=True))
        )

    def capture(self, run_layers: Any, *inputs: Any) -> None:
        """Run the step once as it is and once to record it; both write what a replay writes."""
        self._load(*inputs)
        cache = _BufferCache([_BufferLayer(buffers, self.position) for buffers in self.buffers])
        visibility = KeyVisibility(self.position.squeeze(0), self.key_mask)

        def run() -> torch.Tensor:
            return run_layers(self.hidden_states, self.position_ids, visibility, cache)

        self.out, self.replay = record(run, self.hidden_states.device)

    def step(self, *inputs: Any) -> torch.Tensor:
        """Replay the step and let the cache's layers show the row more that they hold.

        Args:
            *inputs: hidden states `[B, 1, hidden_size]`, position ids `[B or 1, 1]` or None, mask `[B, length + 1]`
                or None.
        """
        cache: Any = self.cache()
        views: list[torch.Tensor] = []
        assert self.out is not None
        assert self.replay is not None
        self._load(*inputs)
        self.replay()
        self.length += 1
        for layer, buffers in zip(cache.layers, self.buffers):
            for name, buffer in buffers.items():
                buffer.filled = self.length
                view = buffer.rows.narrow(-2, 0, self.length)
                setattr(layer, name, view)
                views.append(view)
            layer.values = views[-len(buffers)][..., :0]
        self.views = views
        return self.out.clone()

    def _load(self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        self.hidden_states.copy_(hidden_states)
        self.position.fill_(self.length)
        if position_ids is None:
            self.position_ids.fill_(self.length)
        else:
            self.position_ids.copy_(position_ids.expand_as(self.position_ids))
        if mask is not None and self.key_mask is not None:
            self.key_mask[:, : self.length + 1].copy_(mask)


def record(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, Callable[[], None]]:
    """Run once to warm up, then capture: the tensor that holds the result, and what makes it anew."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        out = run()
    return out, graph.replay


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
    masked = attention_mask is not None
    inputs = hidden_states, position_ids, attention_mask
    known = vars(cache).get(_ATTRIBUTE)
    if isinstance(known, DecodeGraph):
        if known.serves(model, cache, hidden_states, masked):
            return known.step(*inputs)
        known = None
    if known is False:
        return None
    # The number of steps in a row after which the buffers stood still.
    steps = (known or 0) + 1 if _stands_still(cache) else 0
    setattr(cache, _ATTRIBUTE, steps)
    if steps <= STEPS_BEFORE_CAPTURE or not _capturable(model, hidden_states):
        return None
    try:
        graph = DecodeGraph(model, cache, hidden_states, masked)
        graph.capture(run_layers, *inputs)
    except RuntimeError as error:
        setattr(cache, _ATTRIBUTE, False)
        warnings.warn(f"decoding runs step by step, a CUDA graph could not be made: {error}", stacklevel=2)
        return None
    setattr(cache, _ATTRIBUTE, graph)
    return graph.step(*inputs)


def _ordinary(
    model: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    kwargs: dict[str, Any],
) -> bool:
    """Whether this is a plain decoding step, seen from the outside; cheap, asked at every step."""
    config = model.config
    return (
        not torch.compiler.is_compiling()
        and hidden_states.shape[1] == 1
        and model.decode_graphs
        and _device_takes_graphs(hidden_states)
        and type(cache) is DynamicCache
        and not cache.offloading
        and not model.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and config.index_topk is not None
        and len(cache.layers) == config.num_hidden_layers
        and cache.get_seq_length() >= config.index_topk
        and (attention_mask is None or attention_mask.shape[1:] == (cache.get_seq_length() + 1,))
        and not any(kwargs.get(f"output_{name}", getattr(config, f"output_{name}", False)) for name in _OUTPUTS)
        and kwargs.get("indexer_training") is None
    )


def _device_takes_graphs(hidden_states: torch.Tensor) -> bool:
    return hidden_states.is_cuda and not torch.cuda.is_current_stream_capturing()


def _stands_still(cache: Cache) -> bool:
    """Whether every layer has room for a row in the buffer that it grew into."""
    for layer in cache.layers:
        if type(layer) is not DynamicIndexedLayer:
            return False
        for name, tensor in (("keys", layer.keys), ("indexer_keys", layer.indexer_keys)):
            if tensor is not None and buffer_of(layer, name, tensor, tensor.shape[-2] + 1) is None:
                return False
    return cache.get_seq_length() > 0


def _capturable(model: Any, hidden_states: torch.Tensor) -> bool:
    """Whether the layers run the same kernels at every step; looks at every module, asked once a cache."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if "forward" in vars(module) or any(map(_is_foreign, hooks)):
            return False
    if model.config._attn_implementation != TRITON_ATTENTION:
        return False
    sparse = [layer.mlp for layer in model.layers if hasattr(layer.mlp, "experts")]
    tokens = hidden_states.view(-1, hidden_states.shape[-1])
    return all(runs_expert_kernels(mlp, tokens) for mlp in sparse) and all(
        parameter.device == hidden_states.device for parameter in model.layers.parameters()
    )


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is anything but transformers' own capturing, which is idle unless outputs are wanted."""
    module = getattr(getattr(hook, "func", hook), "__module__", "")
    return module != "transformers.utils.output_capturing"


def _circumstances(model: Any, hidden_states: torch.Tensor, masked: bool) -> tuple[Any, ...]:
    """What a captured step depends on besides the cache."""
    first = next(model.layers.parameters())
    return (
        weakref.ref(model),
        str(model._running_pattern),
        model.config._attn_implementation,
        model.config._experts_implementation,
        hidden_states.shape,
        hidden_states.dtype,
        hidden_states.device,
        masked,
        first.data_ptr(),
        torch.is_inference_mode_enabled(),
    )


def _buffers(layer: Any) -> dict[str, Buffer]:
    found = {}
    for name in ("keys", "indexer_keys"):
        tensor = getattr(layer, name)
        if tensor is not None:
            buffer = buffer_of(layer, name, tensor, tensor.shape[-2] + 1)
            assert buffer is not None
            found[name] = buffer
    return found


def _tensors(layer: Any) -> list[torch.Tensor]:
    return [tensor for tensor in (layer.keys, layer.indexer_keys) if tensor is not None]


def _all_tensors(cache: Cache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in _tensors(layer)]
