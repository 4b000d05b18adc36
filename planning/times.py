"""How long prefill and decoding take, reckoned from measured rates, or bounded by what no run can beat.

Every figure says which: `measured`, of this very model, length and pattern; `reckoned`, from rates that were measured
of kernels and other models; `bound`, from rates of a data sheet or products that were not measured: it takes longer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..configuration.configuration_indexcache import IndexCacheConfig
from .known_gpus import Gpu
from .loaded_weights import EMBEDDINGS, EXPERTS, described_tensors, loaded_tensors
from .placement import ABSORBED, LoadedModel, Placement
from .rates import Rates

# The smallest sizes at which whole models were measured: smaller products and shorter prompts fall behind the rates.
_LEAST_WIDTH, _LEAST_LENGTH = 2048, 8192
MEASURED, RECKONED, BOUND = "measured", "reckoned", "bound"


class Figure(NamedTuple):
    """A number, how it was found, and from what.

    Attributes:
        value: seconds, or tokens/s.
        label: `measured`, `reckoned` or `bound`.
        parts: seconds by part, where it is made of such.
        source: of a measured figure.
    """

    value: float
    label: str
    parts: dict[str, float] = {}
    source: str = ""


def prefill_seconds(
    model: LoadedModel, placement: Placement, gpu: Gpu, rates: Rates, batch: int, length: int
) -> Figure:
    """From prompts of `length` tokens to their first tokens."""
    if (found := _measured(model, placement, gpu, rates, batch, length)) is not None:
        return Figure(found["prefill_seconds"], MEASURED, source=rates.source(found))
    config, ranks = model.config, placement.gpus if placement.splits else 1
    rows, of = batch * length, gpu.rates_of
    measured = rates.matmul(of)
    wide = measured or gpu.bf16
    # What our fp8 products reach has not been measured: at best the rate of cuBLAS, or of the data sheet.
    narrow = (rates.matmul(of, fp8=True) or gpu.fp8 or wide) if model.narrow else wide
    label = RECKONED if measured and _is_like_measured(model, placement) and length >= _LEAST_LENGTH else BOUND
    whole, split, absorbed = _attention_weights(config)
    layers, sparse = config.num_hidden_layers, (config.mlp_layer_types or []).count("sparse")
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    shared = 3 * config.hidden_size * _shared_width(config)
    fed = sparse * (config.num_experts_per_tok * expert + shared)
    fed += (layers - sparse) * 3 * config.hidden_size * config.intermediate_size
    parts = {
        "projections": 2 * rows * layers * ((whole + split / ranks) / narrow + absorbed / ranks / wide),
        "experts and feed-forward": 2 * rows * fed / ranks / narrow,
        "attention": _attention_seconds(config, rates, gpu, ranks, batch, length),
        "indexers": _indexer_seconds(config, rates, gpu, batch, length, narrow),
    }
    if placement.splits:
        # Outputs of attention and feed-forward are summed over the ranks, in a ring at the links' full rate.
        summed = 2 * layers * rows * config.hidden_size * 2
        parts["sums over GPUs"] = 2 * (ranks - 1) / ranks * summed / (gpu.link / 2)
    return Figure(sum(parts.values()), label, parts)


def decode_rate(model: LoadedModel, placement: Placement, gpu: Gpu, rates: Rates, batch: int, length: int) -> Figure:
    """Tokens/s of all sequences together, behind `length` tokens each."""
    if (found := _measured(model, placement, gpu, rates, batch, length)) is not None:
        return Figure(found["tokens_per_second"], MEASURED, source=rates.source(found))
    config = model.config
    weights = step_weight_bytes(model, placement, batch)
    own = _step_rate(gpu, rates)
    if own is not None and _is_like_measured(model, placement):
        indexers, attention = _step_kernels(config, rates, gpu, batch, length)
        parts = {"weights": weights / own, "indexers": indexers, "attention": attention}
        return Figure(batch / sum(parts.values()), RECKONED, parts)
    keys = config.share_pattern.num_full * batch * length * config.index_head_dim * 2 if config.index_topk else 0
    attended = min(length, config.index_topk or length)
    latents = config.num_hidden_layers * batch * attended * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
    parts = {
        name: size / gpu.bandwidth for name, size in (("weights", weights), ("indexers", keys), ("attention", latents))
    }
    return Figure(batch / sum(parts.values()), BOUND, parts)


def step_weight_bytes(model: LoadedModel, placement: Placement, batch: int) -> float:
    """Bytes of weights that one GPU reads in a decoding step, or all GPUs in turn where layers lie one behind another.

    Of routed experts as many as `batch` tokens choose on average if all are equally likely.
    """
    config = model.config
    by_kind = dict(model.need(placement if placement.splits else Placement("one GPU", 1), batch, 1).by_kind)
    count = config.n_routed_experts
    read = count * (1 - (1 - config.num_experts_per_tok / count) ** batch) if count else 0.0
    tensors = [tensor for tensor in model.tensors if tensor.module == "embed_tokens"]
    ranks = placement.gpus if placement.splits else 1
    total = by_kind[EXPERTS] * (read / count if count else 0)
    total += sum(by_kind[kind] for kind in by_kind if kind in _READ_WHOLE)
    # The table of embeddings is read by rows; the absorbed copies stand for kv_b_proj.
    total += by_kind[EMBEDDINGS] - (0 if config.tie_word_embeddings else sum(t.nbytes for t in tensors) / ranks)
    if by_kind[ABSORBED]:
        expanding = sum(t.nbytes for t in model.tensors if t.module == "self_attn.kv_b_proj")
        total += by_kind[ABSORBED] - expanding / ranks
    return total


_READ_WHOLE = ("shared experts", "dense feed-forward", "attention", "indexers", "norms and routers")


def _attention_weights(config: IndexCacheConfig) -> tuple[int, int, int]:
    """Weights of a layer's attention: those that every rank has, those that are split, and the absorbed ones."""
    heads, rank, latent = config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    whole = config.hidden_size * ((rank or 0) + latent + config.qk_rope_head_dim)
    split = heads * config.qk_head_dim * (rank or config.hidden_size) + heads * config.v_head_dim * config.hidden_size
    return whole, split, heads * (config.qk_nope_head_dim + config.v_head_dim) * latent


def _shared_width(config: IndexCacheConfig) -> int:
    return config.shared_experts_intermediate_size or config.moe_intermediate_size * config.n_shared_experts


def _attention_seconds(config: IndexCacheConfig, rates: Rates, gpu: Gpu, ranks: int, batch: int, length: int) -> float:
    heads = -(-config.num_attention_heads // ranks)
    topk = min(config.index_topk or length, length)
    # The first queries have fewer keys.
    pairs = batch * (length * topk - topk**2 / 2)
    if config.index_topk is None or length <= config.index_topk:
        per_pair = 2 * heads * (config.qk_head_dim + config.v_head_dim)
        return config.num_hidden_layers * pairs * per_pair / (rates.matmul(gpu.rates_of) or gpu.bf16)
    per_pair = 2 * heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    rate = rates.attention_prefill(gpu.rates_of, heads) or gpu.bf16
    return config.num_hidden_layers * pairs * per_pair / rate


def _indexer_seconds(
    config: IndexCacheConfig, rates: Rates, gpu: Gpu, batch: int, length: int, projections: float
) -> float:
    """Projections, scores and selections of all full layers."""
    if config.index_topk is None:
        return 0.0
    width = config.index_n_heads * config.index_head_dim
    weights = width * (config.q_lora_rank or 0) + config.hidden_size * (config.index_head_dim + config.index_n_heads)
    each = 2 * batch * length * weights / projections
    if length > config.index_topk:
        scores = rates.indexer_prefill(gpu.rates_of, config.index_n_heads, length, config.indexer_fp8)
        rate = gpu.fp8 if config.indexer_fp8 and gpu.fp8 else gpu.bf16
        each += batch * (width * length**2 / rate if scores is None else scores)
    return config.share_pattern.num_full * each


def _step_kernels(config: IndexCacheConfig, rates: Rates, gpu: Gpu, batch: int, length: int) -> tuple[float, float]:
    """Seconds of all indexers, and of all layers' attention, in a decoding step."""
    selects = config.index_topk is not None and length > config.index_topk
    each = (rates.indexer_decode(gpu.rates_of, batch * length) or 0.0) if selects else 0.0
    attention = rates.attention_decode(gpu.rates_of, config.num_attention_heads, batch) or 0.0
    return config.share_pattern.num_full * each, config.num_hidden_layers * attention


def _step_rate(gpu: Gpu, rates: Rates) -> float | None:
    """Bytes of weights per second in a recorded decoding step of `generate()`, from one measured on this GPU.

    What lies between kernels and between steps counts as if it were part of reading.
    """
    for entry in rates.whole(gpu.key):
        if not entry["sets_decode_rate"]:
            continue
        model = described_model(entry["config"], entry["pattern"])
        kernels = _step_kernels(model.config, rates, gpu, 1, entry["tokens"])
        left = 1 / float(entry["tokens_per_second"]) - sum(kernels)
        return step_weight_bytes(model, Placement("one GPU", 1), 1) / left
    return None


def _is_like_measured(model: LoadedModel, placement: Placement) -> bool:
    """Whether rates say how long it takes, and not only how long at least."""
    return not model.narrow and not placement.splits and model.config.hidden_size >= _LEAST_WIDTH


def described_model(fields: dict[str, Any], pattern: str) -> LoadedModel:
    """The unquantised model of a config alone."""
    config = IndexCacheConfig(**{"n_group": 1, "topk_group": 1, **fields}, index_share_pattern=pattern)
    return LoadedModel(config, loaded_tensors(described_tensors(config), config, "BF16"), "BF16", False)


def _measured(
    model: LoadedModel, placement: Placement, gpu: Gpu, rates: Rates, batch: int, length: int
) -> dict[str, Any] | None:
    """A measurement of this model, pattern and length on one such GPU."""
    if batch != 1 or placement.way != "one GPU" or model.narrow:
        return None
    return next((entry for entry in rates.whole(gpu.key) if _is_of(entry, model.config, length)), None)


def _is_of(entry: dict[str, Any], config: IndexCacheConfig, length: int) -> bool:
    fields: Iterable[tuple[str, Any]] = entry["config"].items()
    same = entry["tokens"] == length and entry["pattern"] == config.index_share_pattern
    return same and all(getattr(config, name) == value for name, value in fields)
