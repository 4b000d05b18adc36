"""Decoding steps as one CUDA graph, so that `generate` as it stands is not bound by Python.

A step of one token runs the same kernels on the same memory every time but for the position, which kernels read on
the device. A static cache's memory stands still by design; a dynamic cache's buffers do between the rare times when
they are full (`growing_cache.py`). The layers are captured once, over the whole length of that memory, and replayed.
Nothing is compiled, so a first token costs three slow steps, not minutes. Layers on several devices are captured
device by device; what passes from one to the next is copied between the replays. Whatever is out of the ordinary
(hooks, wanted attentions, beams that reorder the cache, offloaded layers) runs step by step as before.
`model_census.py` notices when the model is no longer the one that was captured.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicIndexedLayer, StaticCache, StaticIndexedLayer

from ...kernels.common.early_launch import early_launches
from ...kernels.common.kernel_launch import are_recorded
from ...kernels.norm_rope_linear.cache_slot import CacheSlot
from ..attention.key_visibility import KeyVisibility
from ..eligibility import is_fast, why_not_plain_step, why_not_recorded
from ..forward_arguments import ForwardOptions
from ..forward_plan import ForwardPlan, angles_of
from ..model_census import ModelCensus, NotCopied
from ..parallel.layer_placement import DeviceRange, device_ranges, runs_on_one_device
from ..selection import EVERY_KEY, Selection
from .growing_cache import Buffer, buffer_of

# Steps in a row that must have found a cache where it was before it is captured.
STEPS_BEFORE_CAPTURE = 2
# Where recording was refused, it is asked for again after so many steps.
STEPS_UNTIL_ASKED_AGAIN = 64
_ATTRIBUTE = "_indexcache_decode_graph"
_CENSUS = "_indexcache_census"
_ROWS = ("keys", "indexer_keys")


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


class _Handed(NamedTuple):
    """What layers on one device hand to those on the next besides hidden states."""

    angles: tuple[torch.Tensor, torch.Tensor]
    selection: Selection


class _Segment:
    """Layers recorded together, on one device: all of them with the last norm, or a range without it.

    Attributes:
        lengths: of a static cache, how many rows each of these layers counts on the device.
        read: of a range, angles and, where its first layer shares it, the selection that replays start from.
        left: the selection that the last layer used.
        out: the hidden states that a replay makes.
    """

    def __init__(self, where: DeviceRange, inputs: StepInputs, capacity: int, in_one: bool) -> None:
        self.first, self.last, self.device = where
        like = inputs.hidden_states
        self.hidden_states = torch.empty_like(like, device=self.device)
        self.position_ids = None
        if in_one and inputs.position_ids is not None:
            self.position_ids = torch.zeros_like(inputs.position_ids)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.key_mask = None
        if inputs.attention_mask is not None:
            self.key_mask = torch.ones(like.shape[0], capacity, dtype=torch.bool, device=self.device)
        self.lengths: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.read: _Handed | None = None
        self.left = EVERY_KEY
        self.out = self.hidden_states
        self.replay: Callable[[], None] | None = None

    def count_on(self, layers: list[Any]) -> None:
        """Let a replay count the rows of a static cache's `layers`."""
        own = layers[self.first : self.last]
        self.lengths = [(length, length.clone()) for layer in own for length in _static_lengths(layer)]

    def read_from(self, handed: _Handed, shares: bool) -> None:
        """Let replays start from copies of what is `handed`: of its selection if the first layer `shares` it."""
        cos, sin = (torch.empty_like(angle, device=self.device) for angle in handed.angles)
        listed = handed.selection.listed if shares else None
        # Of one query nothing is merged.
        copied = torch.empty_like(listed, device=self.device) if isinstance(listed, torch.Tensor) else None
        self.read = _Handed((cos, sin), Selection(copied))

    def load(self, inputs: StepInputs, length: int, handed: _Handed | None = None) -> None:
        """Write a step's inputs where a replay reads them; `handed` is what a range reads besides hidden states."""
        self.hidden_states.copy_(inputs.hidden_states)
        self.position.fill_(length)
        if self.position_ids is not None and inputs.position_ids is not None:
            self.position_ids.copy_(inputs.position_ids)
        if self.key_mask is not None and inputs.attention_mask is not None:
            self.key_mask[:, : inputs.attention_mask.shape[1]].copy_(inputs.attention_mask)
        if self.read is not None and handed is not None:
            for angle, new in zip(self.read.angles, handed.angles):
                angle.copy_(new)
            if self.read.selection.listed is not None:
                self.read.selection.indices().copy_(handed.selection.indices())

    def capture(self, model: Any, rows: list[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """Run the layers once as they are and once to record them; both write what a replay writes."""
        # What the layers see of a cache while they are captured.
        cache = SimpleNamespace(layers=[_BufferLayer(*pair, self.position) for pair in rows])
        # A static cache counts its rows on the device, each layer for itself and all alike.
        lengths = [length for length, _ in self.lengths]
        if lengths and len(set(torch.stack(lengths).tolist())) > 1:
            raise RuntimeError("layers of the static cache hold different numbers of rows")

        def run() -> torch.Tensor:
            if lengths:
                self.position.copy_(lengths[0])
            visibility = KeyVisibility(self.position.squeeze(0), self.key_mask)
            in_one = self.read is None
            angles, selection = self.read or (
                angles_of(model, self.hidden_states, self.position_ids, visibility),
                EVERY_KEY,
            )
            plan = ForwardPlan.recorded(model, visibility, angles, cache)
            out, self.left, _ = plan.run(model, self.hidden_states, selection, self.first, self.last)
            if in_one:
                out = model.norm(out)
            if lengths:
                torch._foreach_add_(lengths, 1)
            return out

        self.out, self.replay = record(run, self.rewind, self.device)

    def rewind(self) -> None:
        """Take back the steps since this object was made, which a static cache counts on the device."""
        for length, earlier in self.lengths:
            length.copy_(earlier)

    def step_back(self) -> None:
        """Take back one replay; what it wrote behind the rows of a cache, the next step writes over."""
        if self.lengths:
            torch._foreach_sub_([length for length, _ in self.lengths], 1)


class DecodeGraph(NotCopied):
    """One captured step for the cache that holds it, in one recording or in one for each device."""

    def __init__(self, model: Any, cache: Any, inputs: StepInputs) -> None:
        self.cache = weakref.ref(cache)
        self.is_static = isinstance(cache, StaticCache)
        self.circumstances = _circumstances(model, inputs)
        #: Of a dynamic cache: its buffers, and the rows in them.
        self.buffers: list[dict[str, Any]] = []
        self.length = 0
        if self.is_static:
            self.capacity = cache.get_max_length()
        else:
            self.buffers = [{name: _buffer(layer, name) for name in _rows_of(layer)} for layer in cache.layers]
            self.capacity = min(buffer.rows.shape[-2] for buffers in self.buffers for buffer in buffers.values())
            self.length = cache.get_seq_length()
        device = inputs.hidden_states.device
        ranges = device_ranges(model.layers, device)
        self.in_one = runs_on_one_device(model, device)
        census = _census_of(model, self.in_one)
        census.users += 1
        self.census = weakref.ref(census)
        weakref.finalize(self, _leave_census, weakref.ref(model), self.census).atexit = False
        self.segments = [_Segment(where, inputs, self.capacity, self.in_one) for where in ranges]
        if self.is_static:
            for segment in self.segments:
                segment.count_on(cache.layers)
        self.tensors = _tensors(cache)

    def serves(self, model: Any, cache: Any, inputs: StepInputs) -> bool:
        """Whether the next step may be replayed: nobody touched the cache since the last one, and memory is there."""
        mask, census = inputs.attention_mask, self.census()
        return (
            self.cache() is cache
            and census is not None
            and census.memory_is_there()
            and (self.is_static or self.length < self.capacity)
            and (mask is None or mask.shape[1] <= self.capacity)
            and self.circumstances == _circumstances(model, inputs)
            and all(now is then for now, then in zip(_tensors(cache), self.tensors, strict=True))
        )

    def capture(self, model: Any, inputs: StepInputs) -> None:
        """Record every segment."""
        rows: list[tuple[torch.Tensor, torch.Tensor | None]]
        if self.is_static:
            found: Any = self.cache()
            rows = [(layer.keys, layer.indexer_keys) for layer in found.layers]
            if not self.in_one and len({int(segment.lengths[0][0]) for segment in self.segments}) > 1:
                raise RuntimeError("layers of the static cache hold different numbers of rows")
        else:
            rows = [(own["keys"].rows, own["indexer_keys"].rows if len(own) > 1 else None) for own in self.buffers]
        handed = self._first_handed(model, inputs)
        for segment in self.segments:
            if handed is not None:
                segment.read_from(handed, shares=not model._running_pattern.is_full(segment.first))
            segment.load(inputs, self.length, handed)
            segment.capture(model, rows)
            if handed is not None:
                # The next segment is recorded on real numbers: selected keys of no meaning could lie anywhere.
                inputs, handed = _replayed(segment, inputs, handed)
        if not self.in_one:
            self.rewind()

    def rewind(self) -> None:
        """Take back all steps since this object was made."""
        for segment in self.segments:
            segment.rewind()

    def step(self, model: Any, inputs: StepInputs) -> torch.Tensor | None:
        """Replay the step; a dynamic cache's layers then show the row more that they hold.

        None when the model is found changed: then the cache is as before, and nothing may be replayed any more. After
        an error, such as no memory for the result, the cache is as before, and the next step may be replayed.
        """
        replayed: list[_Segment] = []
        out = None
        try:
            handed = self._first_handed(model, inputs)
            for segment in self.segments:
                segment.load(inputs, self.length, handed)
                inputs, handed = _replayed(segment, inputs, handed)
                replayed.append(segment)
            # Asked while the device is busy with the replay.
            census = self.census()
            if census is not None and census.unchanged():
                out = inputs.hidden_states.clone()
                out = out if self.in_one else model.norm(out)
            else:
                vars(model).pop(_CENSUS, None)
        finally:
            if out is None:
                for segment in replayed:
                    segment.step_back()
        if out is not None and not self.is_static:
            self._show_row()
        return out

    def _first_handed(self, model: Any, inputs: StepInputs) -> _Handed | None:
        """Where ranges are recorded: the step's angles, made outside of the recordings, and no selection yet."""
        if self.in_one:
            return None
        position_ids, device = inputs.position_ids, inputs.hidden_states.device
        if position_ids is None:
            lengths = self.segments[0].lengths
            slot = lengths[0][0] if lengths else torch.full((1,), self.length, dtype=torch.int64, device=device)
            position_ids = slot.reshape(1, 1).to(device)
        return _Handed(model.rotary_emb(inputs.hidden_states, position_ids), EVERY_KEY)

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


def _replayed(segment: _Segment, inputs: StepInputs, handed: Any) -> tuple[StepInputs, Any]:
    """Replay a segment: its hidden states as the next one's inputs, and what the next one reads besides."""
    assert segment.replay is not None
    segment.replay()
    if segment.read is not None:
        handed = _Handed(handed.angles, segment.left)
    return inputs._replace(hidden_states=segment.out), handed


def record(
    run: Callable[[], torch.Tensor], rewind: Callable[[], None], device: torch.device
) -> tuple[torch.Tensor, Callable[[], None]]:
    """Run once to warm up, rewind, then capture: the tensor that holds the result, and what makes it anew."""
    if are_recorded():
        # Their variants are wanted, and nothing runs.
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
    """One stream per device for all recordings: cuBLAS keeps a workspace of 32 MiB for every stream it has seen."""
    return torch.cuda.Stream(device)


def decode_graph(
    model: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    options: ForwardOptions,
) -> torch.Tensor | None:
    """The step's last hidden states `[B, 1, hidden_size]` from a graph, or None: run it step by step.

    `hidden_states` are the embedded tokens; everything else is as the decoder's `forward` was given it.

    Raises:
        torch.OutOfMemoryError: in a recording or a replay. The cache is as before, and the next call tries the same.
    """
    if why_not_plain_step(model, hidden_states, attention_mask, cache, options) is not None:
        return None
    assert cache is not None
    inputs = StepInputs(hidden_states, position_ids, attention_mask)
    known = vars(cache).get(_ATTRIBUTE)
    if isinstance(known, DecodeGraph):
        replayed = known.step(model, inputs) if known.serves(model, cache, inputs) else None
        if replayed is not None:
            return replayed
        known = None
    if known is False:
        return None
    # Steps in a row for which the cache's memory stood still.
    memory = _memory(cache)
    steps = known.steps + 1 if isinstance(known, _Watch) and known.memory == memory else 0
    setattr(cache, _ATTRIBUTE, _Watch(steps, memory))
    # Where recording is refused, the next time to ask is a while later: it takes a look at every module.
    if memory is None or steps < STEPS_BEFORE_CAPTURE or (steps - STEPS_BEFORE_CAPTURE) % STEPS_UNTIL_ASKED_AGAIN:
        return None
    reason = why_not_recorded(model, hidden_states)
    if not is_fast("decoding steps are not recorded", reason, model, hidden_states):
        return None
    graph = None
    try:
        graph = DecodeGraph(model, cache, inputs)
        graph.capture(model, inputs)
    except RuntimeError as error:
        if graph is not None:
            graph.rewind()
        if no_memory := _out_of_memory(error):
            # As if this step had never been asked for.
            setattr(cache, _ATTRIBUTE, known)
            raise no_memory from error
        setattr(cache, _ATTRIBUTE, False)
        warnings.warn(f"decoding runs step by step, a CUDA graph could not be made: {error}", stacklevel=2)
        return None
    setattr(cache, _ATTRIBUTE, graph)
    return graph.step(model, inputs)


def _out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The lack of memory behind an error: where it breaks a recording, the end of the recording fails after it."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error


def _census_of(model: Any, in_one: bool) -> ModelCensus:
    """The model's census, made now unless one is there that still holds; it lives and dies with the model."""
    census = vars(model).get(_CENSUS)
    if census is None or not (census.memory_is_there() and census.unchanged()):
        census = ModelCensus(model, ("layers", "norm", "rotary_emb") if in_one else ("layers",))
        vars(model)[_CENSUS] = census
    return census


def _leave_census(model: weakref.ref[Any], census: weakref.ref[ModelCensus]) -> None:
    """A graph is gone: without graphs a census would only keep alive what is taken out of the model later."""
    found, owner = census(), model()
    if found is None:
        return
    found.users -= 1
    if not found.users and owner is not None and vars(owner).get(_CENSUS) is found:
        del vars(owner)[_CENSUS]


def _memory(cache: Any) -> tuple[int, ...] | None:
    """Addresses of what every layer writes its next row to, or None where that is new memory."""
    addresses = []
    for layer in cache.layers:
        if type(layer) not in (DynamicIndexedLayer, StaticIndexedLayer) or layer.keys is None:
            return None
        rows = _rows_of(layer)
        if type(layer) is DynamicIndexedLayer and None in (_buffer(layer, name) for name in rows):
            return None
        addresses += [tensor.data_ptr() for tensor in rows.values()]
    return tuple(addresses)


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
        torch.is_inference_mode_enabled(),
    )


def _rows_of(layer: Any) -> dict[str, torch.Tensor]:
    """What a cache layer holds, by the name of the attribute."""
    return {name: tensor for name in _ROWS if (tensor := getattr(layer, name)) is not None}


def _buffer(layer: Any, name: str) -> Buffer | None:
    """The buffer of a dynamic layer's rows, with room for one more; or None."""
    rows = getattr(layer, name)
    return buffer_of(layer, name, rows, rows.shape[-2] + 1)


def _tensors(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in _rows_of(layer).values()]


def _static_lengths(layer: Any) -> list[torch.Tensor]:
    return [t for t in (layer.cumulative_length, layer.indexer_cumulative_length) if t is not None]
