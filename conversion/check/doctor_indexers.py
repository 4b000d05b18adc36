"""Which layers hold an indexer, how layers are counted, and whether the indexers' values are those of a trained one.

transformers fills weights that it does not find with random numbers, and a model saved afterwards holds them. A few
numbers of each tensor tell: a trained LayerNorm is never exactly ones and zeros, and a trained matrix is not normal
with the standard deviation of the initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..convert.families import INDEXER, MTP_MARK, layer_of
from ..io.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from ..io.tensor_stream import TORCH_DTYPES
from .doctor_findings import ERROR, NOTE, Finding, layers_text

PARTS = ("wq_b", "wk", "weights_proj", "k_norm")
# Numbers read of each tensor, from its beginning: 128 KB in bf16, also from the Hub.
_SAMPLE = 65536
# How many standard errors a sample's moments may lie from those of the distribution it is compared with.
_STANDARD_ERRORS = 5


@dataclass(frozen=True)
class Layers:
    """How the weights count layers.

    Attributes:
        whole: decoder layers whose indexer is there with all parts.
        partial: those that hold some of its parts, with the parts they lack.
        mtp: multi-token-prediction layers, wherever they are numbered.
        count: decoder layers, MTP layers left out.
    """

    whole: set[int]
    partial: dict[int, list[str]]
    mtp: list[int]
    count: int


def count_layers(checkpoint: Checkpoint) -> Layers:
    """Read the layers from the names of the weights."""
    parts: dict[int, set[str]] = {}
    seen: set[int] = set()
    mtp: set[int] = set()
    for name in checkpoint.tensors:
        place = layer_of(name)
        if place is None:
            continue
        layer, inner = place
        seen.add(layer)
        if inner.startswith(MTP_MARK.partition(".")[0] + "."):
            mtp.add(layer)
        if inner.startswith(INDEXER):
            parts.setdefault(layer, set()).add(inner.removeprefix(INDEXER).partition(".")[0])
    decoder = {layer: found for layer, found in parts.items() if layer not in mtp}
    partial = {layer: sorted(set(PARTS) - found) for layer, found in decoder.items() if not set(PARTS) <= found}
    count = 1 + max(seen - mtp, default=-1)
    return Layers(set(decoder) - set(partial), partial, sorted(mtp), count)


def layer_findings(config: dict[str, Any], layers: Layers) -> list[Finding]:
    """Where `num_hidden_layers` and the weights count differently, and indexers that are there in part."""
    found, described = [], config["num_hidden_layers"]
    name, effect = "num_hidden_layers", "engines build layers that have no weights, or leave layers out"
    counted = [layer for layer in layers.mtp if layer < described]
    if counted:
        found.append(
            Finding(
                "layer_count_with_mtp", ERROR, name,
                f"num_hidden_layers={described} counts layer {layers_text(counted)}, which is an MTP layer",
                "engines run the MTP layer as a decoder layer behind the others: every token is wrong",
                f"set it to {layers.count}; MTP layers are num_nextn_predict_layers",
            )
        )  # fmt: skip
    elif described != layers.count:
        hint = ""
        if layers.mtp and layers.count - described == len(layers.mtp):
            hint = ", as if MTP layers had been taken off twice"
        found.append(
            Finding(
                "layer_count", ERROR, name,
                f"num_hidden_layers={described}, and the weights hold {layers.count} decoder layers{hint}", effect,
                f"set it to {layers.count}, or fetch the weights again",
            )
        )  # fmt: skip
    predicted = config.get("num_nextn_predict_layers")
    if type(predicted) is int and predicted != len(layers.mtp) and not counted:
        found.append(
            Finding(
                "mtp_layers", NOTE, "num_nextn_predict_layers",
                f"num_nextn_predict_layers={predicted}, and the weights hold {len(layers.mtp)} MTP layers",
                "speculative decoding with the model's own MTP layer does not load; else nothing",
                f"set it to {len(layers.mtp)}",
            )
        )  # fmt: skip
    if layers.partial:
        lacking = sorted({part for parts in layers.partial.values() for part in parts})
        found.append(
            Finding(
                "indexer_incomplete", ERROR, f"layers {layers_text(layers.partial)}",
                f"their indexers lack {', '.join(lacking)}",
                "IndexCache refuses it, whether the layer is full or shared; in a full layer transformers fills the "
                "rest with random numbers",
                "fetch the weights again; if the layers are shared, drop what is left of their indexers",
            )
        )  # fmt: skip
    return found


# ---- values ---------------------------------------------------------------------------------------------------------


def value_findings(checkpoint: Checkpoint, layers: Layers) -> list[Finding]:
    """Indexers that hold no trained values: zero, constant, not finite, or fresh from an initialisation."""
    tensors = checkpoint.tensors
    spread = checkpoint.config.get("initializer_range", 0.02)
    dead: dict[str, list[str]] = {}
    fresh = []
    for layer in sorted(layers.whole):
        samples = dict(_samples(checkpoint, tensors, layer))
        for name, values in samples.items():
            if kind := _dead(values, name):
                dead.setdefault(kind, []).append(f"{layer}.{name}")
        if _is_fresh(samples, tensors, layer, spread):
            fresh.append(layer)
    found = [
        Finding(
            "indexer_dead", ERROR, ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else ""),
            f"these indexer tensors are {kind}",
            "every key scores alike or not at all: which ones are selected beyond top-k tokens is chance",
            "take these tensors from the checkpoint that this one was made of",
        )
        for kind, names in dead.items()
    ]  # fmt: skip
    if fresh:
        found.append(
            Finding(
                "indexer_random", ERROR, f"layers {layers_text(fresh)}",
                "these indexers have the values of a fresh random initialisation",
                "selections beyond top-k tokens are random: an engine filled what it did not find, and it was saved",
                "take these layers' indexers from the checkpoint that this one was made of, or share these layers",
            )
        )  # fmt: skip
    return found


def _samples(checkpoint: Checkpoint, tensors: dict[str, TensorInfo], layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The first numbers of a layer's indexer tensors, by name within the indexer; fp8 without its scales."""
    prefix = f"model.layers.{layer}.{INDEXER}"
    for name in ("wq_b.weight", "wk.weight", "weights_proj.weight", "k_norm.weight", "k_norm.bias"):
        info = tensors.get(prefix + name)
        if info is None or info.dtype not in TORCH_DTYPES or not info.nbytes:
            continue
        dtype = TORCH_DTYPES[info.dtype]
        end = min(info.end, info.begin + _SAMPLE * dtype.itemsize)
        raw = bytearray(checkpoint.source.read_range(info.file, info.begin, end))
        yield name, torch.frombuffer(raw, dtype=dtype).double()


def _dead(values: torch.Tensor, name: str) -> str | None:
    if not values.isfinite().all():
        return "not finite"
    if name == "k_norm.bias" or len(values) < 2:
        return None
    if not values.any():
        return "all zero"
    # A LayerNorm that begins at ones is told of with the matrices, as fresh.
    return "constant" if name != "k_norm.weight" and bool((values == values[0]).all()) else None


def _is_fresh(samples: dict[str, torch.Tensor], tensors: dict[str, TensorInfo], layer: int, spread: Any) -> bool:
    norm, bias = samples.get("k_norm.weight"), samples.get("k_norm.bias")
    if norm is None or bias is None or not bool((norm == 1).all()) or bias.any():
        return False
    drawn = []
    for name in ("wq_b.weight", "wk.weight", "weights_proj.weight"):
        info = tensors.get(f"model.layers.{layer}.{INDEXER}{name}")
        if name in samples and info is not None and info.dtype in FLOAT_DTYPES and len(info.shape) == 2:
            values = samples[name]
            drawn.append(_is_normal(values, spread) or _is_uniform(values, info.shape[1] ** -0.5))
    return bool(drawn) and all(drawn)


def _is_normal(values: torch.Tensor, spread: Any) -> bool:
    """Whether a sample may be of transformers' initialisation: normal, mean 0, standard deviation `spread`."""
    return isinstance(spread, int | float) and _has_moments(values, float(spread), kurtosis=3.0)


def _is_uniform(values: torch.Tensor, bound: float) -> bool:
    """Whether a sample may be of torch's and MLX's initialisation of linear layers: uniform within `bound`."""
    inside = bool((values.abs() <= bound * (1 + 2**-7)).all())
    return inside and _has_moments(values, bound / math.sqrt(3), kurtosis=1.8)


def _has_moments(values: torch.Tensor, spread: float, *, kurtosis: float) -> bool:
    """Whether standard deviation and kurtosis lie within a normal sample's error; bf16 rounds by up to 2^-9."""
    count, deviation = len(values), values.std().item()
    if count < 100 or spread <= 0 or deviation <= 0:
        return False
    measured = ((values - values.mean()) / deviation).pow(4).mean().item()
    error_of_spread = _STANDARD_ERRORS / math.sqrt(2 * count) + 2**-9
    error_of_kurtosis = _STANDARD_ERRORS * math.sqrt(24 / count) + 2**-7
    return abs(deviation / spread - 1) <= error_of_spread and abs(measured - kurtosis) <= error_of_kurtosis
