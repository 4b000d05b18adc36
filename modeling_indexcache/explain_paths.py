"""Which path each kind of forward of a decoder takes, module by module why not a faster one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from .attention.attention_backends import TRITON_ATTENTION
from .eligibility import (
    is_plain_block_fp8,
    one_token,
    why_layers_keep_inputs,
    why_no_graphs,
    why_not_expert_kernels,
    why_not_in_place,
    why_not_plain,
    why_not_streamed,
)
from .parallel.layer_placement import device_of_layer, device_ranges
from .parallel.module_hooks import is_own


@dataclass(frozen=True)
class Path:
    """What runs, and everything that keeps a faster path from running, modules named."""

    runs: str
    why_not_faster: tuple[str, ...] = ()


@dataclass(frozen=True)
class Paths:
    """Which path each kind of forward of a decoder takes without gradient."""

    prefill: Path
    decode: Path
    recorded: Path

    def __str__(self) -> str:
        lines = []
        for kind in fields(self):
            path: Path = getattr(self, kind.name)
            lines.append(f"{kind.name}: {path.runs}")
            lines += [f"  not faster: {reason}" for reason in path.why_not_faster]
        return "\n".join(lines)


@torch.no_grad()
def explain_paths(model: Any) -> Paths:
    """Which path prefill, decoding steps and recorded steps of a decoder take in `generate`, and why not a faster one.

    `prefill` is "streamed, in place", "streamed" or "module by module"; `decode` is "kernels for few tokens",
    "streamed" or "module by module"; `recorded` is "one graph", so many "graphs, one for each range of layers on a
    device", or "not recorded".
    """
    first = one_token(model)
    like = first.new_empty(first.shape, device="meta")
    slow, inputs, parts, device = _Reasons(), _Reasons(), _Reasons(), first.device
    for index, layer in enumerate(model.layers):
        device = device_of_layer(layer, device)
        keeps = why_layers_keep_inputs([layer], device)
        inputs.add(index, keeps and keeps.removeprefix("layers.0").lstrip(".: "))
        if not is_own(layer):
            slow.add(index, f"replaced by {type(layer).__name__}")
            continue
        reason = why_not_in_place(layer.self_attn, device) or why_not_streamed(model, like)
        slow.add(index, reason and f"self_attn: {reason}")
        for name, reason in _slower_parts(layer, device, model.config._attn_implementation == TRITON_ATTENTION):
            parts.add(index, f"{name}: {reason}")
    reasons = slow.listed() + inputs.listed() + parts.listed()
    by_kernels = model.config._attn_implementation == TRITON_ATTENTION and first.is_cuda
    if not by_kernels:
        where = f"attn_implementation is {model.config._attn_implementation!r}, the model on {first.device}"
        reasons = (f'{where}: kernels run as "triton" on CUDA', *reasons)
    streams = "module by module" if slow else "streamed"
    prefill = Path("streamed, in place" if not slow and not inputs else streams, reasons)
    few = by_kernels and not slow and not parts
    kept = set(inputs.listed())
    decode = Path("kernels for few tokens" if few else streams, tuple(r for r in reasons if r not in kept))
    reason = why_no_graphs(model)
    if reason is not None:
        return Paths(prefill, decode, Path("not recorded", (reason,)))
    graphs = len(device_ranges(model.layers, first.device))
    runs = "one graph" if graphs == 1 else f"{graphs} graphs, one for each range of layers on a device"
    return Paths(prefill, decode, Path(runs))


def _slower_parts(layer: Any, device: torch.device, by_kernels: bool) -> Iterator[tuple[str, str]]:
    """Parts of an own layer that run as modules where weights could be read, and why."""
    linear = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    for name in (*linear, "indexer.wq_b", "indexer.wk", "indexer.weights_proj"):
        part = _at(layer, f"self_attn.{name}")
        if part is not None and not is_plain_block_fp8(part) and (reason := why_not_plain(part)):
            yield f"self_attn.{name}", reason
    for name in ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "self_attn.indexer", "mlp"):
        part = _at(layer, name)
        if part is not None and (reason := why_not_in_place(part, device)):
            yield name, reason
    if not is_own(layer.mlp):
        return
    for name in ("mlp.gate", "mlp.experts", "mlp.shared_experts"):
        part = _at(layer, name)
        if part is not None and (reason := why_not_in_place(part, device)):
            yield name, reason
    if by_kernels and hasattr(layer.mlp, "experts"):
        like = torch.empty(1, layer.mlp.config.hidden_size, dtype=layer.self_attn.kv_a_layernorm.weight.dtype)
        if reason := why_not_expert_kernels(layer.mlp, like.to(device)):
            yield "mlp", reason


def _at(module: Any, path: str) -> Any:
    """The part of a module under a dotted name, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


class _Reasons:
    """Reasons of many layers, each said once."""

    def __init__(self) -> None:
        self._layers: dict[str, list[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._layers)

    def add(self, layer: int, reason: str | None) -> None:
        if reason:
            self._layers.setdefault(reason, []).append(layer)

    def listed(self) -> tuple[str, ...]:
        """`layer 0: reason`, `layers 0, 2-5: reason`, in the order in which reasons came."""
        return tuple(
            f"{'layer' if len(layers) == 1 else 'layers'} {_spans(layers)}: {reason}"
            for reason, layers in self._layers.items()
        )


def _spans(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
