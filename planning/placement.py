"""Ways to place a model on GPUs, and the bytes that each leaves on the fullest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ..configuration.configuration_indexcache import IndexCacheConfig
from ..conversion.io.checkpoint import DTYPE_BITS
from .cache_memory import cache_rows, layer_cache_bytes
from .loaded_weights import EXPERTS, WEIGHT_KINDS, LoadedTensor, parallel_styles, split_dimension
from .workspace import Prefill, workspace_bytes

ABSORBED, LATENTS, INDEX_KEYS, WORKSPACE = (
    "absorbed kv_b_proj",
    "latents cache",
    "index-key cache",
    "prefill workspace",
)
#: What takes memory, in the order of tables.
MEMORY_KINDS = (*WEIGHT_KINDS, ABSORBED, LATENTS, INDEX_KEYS, WORKSPACE)
_EXPANDING = "self_attn.kv_b_proj"

Way = Literal["one GPU", "device_map", "tensor parallel", "expert parallel"]


@dataclass(frozen=True)
class Placement:
    """A way to place a model.

    Attributes:
        way: `one GPU`; `device_map`, layers one behind the other; `tensor parallel`, heads and widths of all layers
            split; `expert parallel`, the same but whole experts.
        gpus: how many it takes.
    """

    way: Way
    gpus: int

    @property
    def splits(self) -> bool:
        """Whether each GPU has a part of every layer, in a process of its own."""
        return self.way in ("tensor parallel", "expert parallel")

    @property
    def name(self) -> str:
        """As tables call it: TP and EP are tensor and expert parallel."""
        short = {"tensor parallel": "TP", "expert parallel": "EP"}.get(self.way, self.way)
        return short if self.way == "one GPU" else f"{short} x {self.gpus}"


def placements(gpus: int) -> list[Placement]:
    """What can be done with so many GPUs."""
    one = [Placement("one GPU", 1)]
    return (
        one if gpus == 1 else one + [Placement(w, gpus) for w in ("device_map", "tensor parallel", "expert parallel")]
    )


def why_not(
    placement: Placement, config: IndexCacheConfig, tensors: Sequence[LoadedTensor], block_size: tuple[int, int] | None
) -> str | None:
    """Why a model cannot be placed so, whatever the memory; None if it can.

    Args:
        placement: the way.
        config: of the model.
        tensors: what is loaded.
        block_size: rows and columns that share an fp8 scale.
    """
    ranks, sparse = placement.gpus, "sparse" in (config.mlp_layer_types or [])
    if placement.way == "device_map" and ranks > config.num_hidden_layers:
        return f"{config.num_hidden_layers} layers are fewer than {ranks} GPUs"
    if not placement.splits:
        return None
    if placement.way == "expert parallel" and not sparse:
        return "no layer has experts"
    if placement.way == "expert parallel" and config.n_routed_experts % ranks:
        return f"{config.n_routed_experts} experts cannot be divided over {ranks} GPUs"
    if config.num_attention_heads % ranks:
        return f"{config.num_attention_heads} attention heads cannot be divided over {ranks} GPUs"
    return _ragged_split(placement, config, tensors, block_size) if block_size else None


def _ragged_split(
    placement: Placement, config: IndexCacheConfig, tensors: Sequence[LoadedTensor], block_size: tuple[int, int]
) -> str | None:
    """An fp8 weight whose shares would be no whole blocks: its scales would be split elsewhere than it is."""
    styles = parallel_styles(config)
    for tensor in tensors:
        dimension = split_dimension(tensor.module, styles)
        by_number = placement.way == "expert parallel" and tensor.kind == EXPERTS
        if dimension is None or by_number or not tensor.narrow:
            continue
        side, block = tensor.shape[dimension], block_size[dimension]
        if side % (placement.gpus * block):
            return (
                f"{tensor.module}: {side} {'columns' if dimension else 'rows'} over {placement.gpus} GPUs are no "
                f"whole fp8 blocks of {block}"
            )
    return None


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on the GPU that needs most, by kind, and what decides where layers go.

    Attributes:
        by_kind: bytes by `MEMORY_KINDS`.
        layers: of a device_map, the number of layers on each GPU.
    """

    by_kind: dict[str, int]
    layers: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.by_kind.values())


@dataclass
class LoadedModel:
    """What placements divide; nothing of it changes.

    Attributes:
        config: with the pattern that runs.
        tensors: loaded, see `loaded_tensors`.
        dtype: of the model, as headers spell it.
        narrow: its linear layers are block fp8.
        cache: `static` or `dynamic`.
        chunk: tokens of each prompt at a time; 0: all.
    """

    config: IndexCacheConfig
    tensors: Sequence[LoadedTensor]
    dtype: str
    narrow: bool
    cache: str = "static"
    chunk: int = 0
    _shares: dict[Placement, dict[str, int]] = field(default_factory=dict)

    @cached_property
    def weights_by_layer(self) -> list[dict[str, int]]:
        """Bytes by kind of each layer, absorbed copies included; embeddings come first, norm and head last."""
        count = self.config.num_hidden_layers
        parts: list[dict[str, int]] = [{} for _ in range(count + 2)]
        for tensor in self.tensors:
            outer = 0 if tensor.module == "embed_tokens" else count + 1
            part = parts[outer if tensor.layer is None else tensor.layer + 1]
            part[tensor.kind] = part.get(tensor.kind, 0) + tensor.nbytes
            if tensor.module == _EXPANDING and tensor.narrow:
                part[ABSORBED] = part.get(ABSORBED, 0) + self._widened(tensor, tensor.nbytes)
        return parts

    def _widened(self, tensor: LoadedTensor, size: int) -> int:
        """Bytes in the model's dtype of what takes `size` as it is loaded."""
        return size * DTYPE_BITS[self.dtype] // tensor.bits

    def need(self, placement: Placement, batch: int, length: int) -> MemoryNeed:
        """Memory of a batch of sequences that end up `length` tokens long, prompts prefilled together."""
        config, ranks = self.config, placement.gpus if placement.splits else 1
        rows = cache_rows(self.cache, length)
        caches = [
            layer_cache_bytes(config, layer, batch, rows, self.dtype) for layer in range(config.num_hidden_layers)
        ]
        prefill = Prefill(config, batch, length, ranks, self.narrow, placement.splits, self.chunk)
        if not placement.splits:
            return _fullest(self.weights_by_layer, caches, placement.gpus, prefill)
        parts = dict(self._split(placement))
        parts[LATENTS] = sum(latents for latents, _ in caches)
        parts[INDEX_KEYS] = sum(index_keys for _, index_keys in caches)
        parts[WORKSPACE] = workspace_bytes(prefill, [sum(pair) for pair in caches])
        return MemoryNeed({kind: parts.get(kind, 0) for kind in MEMORY_KINDS})

    def _split(self, placement: Placement) -> dict[str, int]:
        """Weights of the first rank, which gets the largest share of what does not divide."""
        if placement in self._shares:
            return self._shares[placement]
        styles, ranks = parallel_styles(self.config), placement.gpus
        parts: dict[str, int] = {}
        for tensor in self.tensors:
            by_number = placement.way == "expert parallel" and tensor.kind == EXPERTS
            size = tensor.nbytes if by_number else tensor.split_bytes(ranks, styles)
            parts[tensor.kind] = parts.get(tensor.kind, 0) + size
            # Sharded weights are no plain ones: what is multiplied by is made of them once.
            if tensor.module == _EXPANDING and not tensor.is_scale:
                parts[ABSORBED] = parts.get(ABSORBED, 0) + self._widened(tensor, size)
        if placement.way == "expert parallel":
            parts[EXPERTS] = parts.get(EXPERTS, 0) // ranks
        self._shares[placement] = parts
        return parts


def _balanced(sizes: Sequence[int], gpus: int) -> list[int]:
    """How many of `sizes`, one behind the other, go to each GPU so that the largest sum is smallest."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(sizes, middle)) <= gpus:
            high = middle
        else:
            low = middle + 1
    counts = _filled(sizes, low)
    return counts + [0] * (gpus - len(counts))


def _filled(sizes: Sequence[int], limit: int) -> list[int]:
    counts, filled = [0], 0
    for size in sizes:
        if filled + size > limit and counts[-1]:
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
    return counts


def _fullest(
    by_layer: Sequence[dict[str, int]], caches: Sequence[tuple[int, int]], gpus: int, prefill: Prefill
) -> MemoryNeed:
    """The GPU that needs most when `by_layer`, one behind the other, and their caches are spread evenly."""
    layers = [(0, 0), *caches, (0, 0)]
    counts = _balanced([sum(part.values()) + sum(cache) for part, cache in zip(by_layer, layers)], gpus)
    most = MemoryNeed({})
    first = 0
    for count in counts:
        last = first + count
        held: dict[str, int] = dict.fromkeys(MEMORY_KINDS, 0)
        for part in by_layer[first:last]:
            for kind, size in part.items():
                held[kind] += size
        held[LATENTS] = sum(latents for latents, _ in layers[first:last])
        held[INDEX_KEYS] = sum(index_keys for _, index_keys in layers[first:last])
        # Embeddings come before layer 0, norm and head behind the last.
        inner = range(max(first - 1, 0), min(last - 1, len(caches)))
        held[WORKSPACE] = workspace_bytes(prefill, [sum(caches[layer]) for layer in inner], inner.start)
        if sum(held.values()) > most.total:
            most = MemoryNeed(held, tuple(counts))
        first = last
    return most
