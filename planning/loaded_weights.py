"""What a checkpoint's tensors become in memory, from its headers: bytes by kind and layer, and which share a GPU gets.

fp8 weights and their scales stay as they are stored, all else takes the model's dtype, but for the router's bias.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..configuration.configuration_indexcache import IndexCacheConfig
from ..conversion.convert.families import expected_indexer, expected_tensors, layer_of
from ..conversion.io.checkpoint import DTYPE_BITS, FLOAT_DTYPES
from ..conversion.io.fp8 import FP8, SCALE_SUFFIX
from ..modeling_indexcache.transformers_compat import ROUTER_IN_FP32

EXPERTS, SHARED_EXPERTS, DENSE, ATTENTION, INDEXERS, EMBEDDINGS, NORMS = (
    "routed experts",
    "shared experts",
    "dense feed-forward",
    "attention",
    "indexers",
    "embeddings and head",
    "norms and routers",
)
#: Kinds of weights, in the order of tables.
WEIGHT_KINDS = (EXPERTS, SHARED_EXPERTS, DENSE, ATTENTION, INDEXERS, EMBEDDINGS, NORMS)

_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.")
_STACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
# The dimension that a style of transformers' tensor parallel plans splits; other styles leave a module whole.
_SPLIT_DIMENSION = {
    "colwise": 0,
    "packed_colwise": 0,
    "colwise_gather_output": 0,
    "embedding_rowwise": 0,
    "rowwise": 1,
}
# Outside the layers: transformers' own rule for embeddings, and the head's of `IndexCacheForCausalLM`.
_OUTER_STYLES = {"embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}


class StoredTensor(NamedTuple):
    """A tensor as a header has it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class LoadedTensor(NamedTuple):
    """A tensor in memory, or several that differ in their expert alone.

    Attributes:
        kind: one of `WEIGHT_KINDS`.
        layer: decoder layer; None outside of them.
        module: its module without the layer, `self_attn.q_b_proj`; of experts the stacked weight,
            `mlp.experts.down_proj`.
        shape: as stored.
        bits: of an element.
        narrow: it is block fp8.
        is_scale: it is the scales of such a weight.
        copies: how many there are.
    """

    kind: str
    layer: int | None
    module: str
    shape: tuple[int, ...]
    bits: int
    narrow: bool
    is_scale: bool
    copies: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.copies * math.prod(self.shape) * self.bits // 8

    def split_bytes(self, ranks: int, styles: dict[str, str]) -> int:
        """Bytes of the largest share of `ranks` under tensor parallel `styles`, see `parallel_styles`."""
        dimension = split_dimension(self.module, styles)
        if dimension is None or dimension >= len(self.shape):
            return self.nbytes
        shape = list(self.shape)
        shape[dimension] = -(-shape[dimension] // ranks)
        return self.copies * math.prod(shape) * self.bits // 8


def model_dtype(config: IndexCacheConfig, tensors: Iterable[StoredTensor]) -> str:
    """The dtype that `dtype="auto"` loads in, as headers spell it: the config's, else that of the first floats."""
    named = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    found = named.get(str(config.dtype).removeprefix("torch."))
    return found or next((tensor.dtype for tensor in tensors if tensor.dtype in FLOAT_DTYPES), "BF16")


def loaded_tensors(
    tensors: Iterable[StoredTensor], config: IndexCacheConfig, dtype: str | None = None
) -> list[LoadedTensor]:
    """All tensors that loading a checkpoint with `config` leaves in memory.

    Layers for multi-token prediction are not loaded, nor are indexers of layers that the config's pattern shares.

    Args:
        tensors: of the checkpoint's headers.
        config: with the pattern that runs.
        dtype: of the model, as headers spell it; `model_dtype` by default.
    """
    stored = list(tensors)
    bits = DTYPE_BITS[dtype or model_dtype(config, stored)]
    pattern, found = config.share_pattern, Counter[LoadedTensor]()
    for tensor in stored:
        place = layer_of(tensor.name)
        layer = place[0] if place else None
        if layer is not None and layer >= len(pattern):
            continue
        kind, module = _kind_and_module(tensor.name, place)
        if kind == INDEXERS and not pattern.is_full(layer or 0):
            continue
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        narrow, is_scale = tensor.dtype == FP8, tensor.name.endswith(SCALE_SUFFIX)
        in_fp32 = tensor.dtype == "F32" and any(name in tensor.name for name in ROUTER_IN_FP32)
        as_stored = narrow or is_scale or in_fp32
        own_bits = 32 if tensor.name.endswith("e_score_correction_bias") else bits
        size = DTYPE_BITS[tensor.dtype] if as_stored else own_bits
        found[LoadedTensor(kind, layer, module, tensor.shape, size, narrow, is_scale)] += 1
    return [tensor._replace(copies=copies) for tensor, copies in found.items()]


def described_tensors(config: IndexCacheConfig, dtype: str = "BF16") -> Iterator[StoredTensor]:
    """The tensors of a checkpoint that has no files: all that `config` describes, unquantised."""
    expected = expected_tensors(config)
    for layer in config.share_pattern.full_layers:
        expected |= expected_indexer(config, layer)
    for name, tensor in expected.items():
        yield StoredTensor(name, tensor.shape, dtype)


def multi_token_bytes(tensors: Iterable[StoredTensor], layers: int) -> int:
    """Bytes on disk of the layers for multi-token prediction, behind the `layers` of the decoder."""
    places = ((tensor, layer_of(tensor.name)) for tensor in tensors)
    behind = [tensor for tensor, place in places if place and place[0] >= layers]
    return sum(math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8 for tensor in behind)


def parallel_styles(config: IndexCacheConfig) -> dict[str, str]:
    """Style by module, as `LoadedTensor.module` names it, of transformers' tensor parallel plan for these models."""
    inner = {name.removeprefix("layers.*."): style for name, style in config.base_model_tp_plan.items()}
    return {**inner, **_OUTER_STYLES}


def split_dimension(module: str, styles: dict[str, str]) -> int | None:
    """The dimension of a module's weights that tensor parallel `styles` split; None where ranks hold all of it."""
    return _SPLIT_DIMENSION.get(styles.get(module, ""))


def _kind_and_module(name: str, place: tuple[int, str] | None) -> tuple[str, str]:
    if place is None:
        module = name.removeprefix("model.").split(".")[0]
        return (NORMS if module == "norm" else EMBEDDINGS), module
    inside = place[1]
    expert = _EXPERT.match(inside)
    if expert:
        return EXPERTS, f"mlp.experts.{_STACKED[expert[2]]}"
    module = inside.removesuffix(SCALE_SUFFIX).rpartition(".")[0]
    is_norm = "norm" in module.split(".")[-1] and ".indexer." not in inside
    if is_norm or module == "mlp.gate":
        return NORMS, module
    for start, kind in (
        ("self_attn.indexer.", INDEXERS),
        ("self_attn.", ATTENTION),
        ("mlp.shared_experts.", SHARED_EXPERTS),
        ("mlp.", DENSE),
    ):
        if inside.startswith(start):
            return kind, module
    return NORMS, module
