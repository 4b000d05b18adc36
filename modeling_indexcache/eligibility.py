"""Which path a forward takes, and why not a faster one: every such question is asked here, and answers carry reasons.

A function `why_not_x` returns None where x runs, or what stands against it. `explain_paths` asks them for a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.utils import logging

from ..kernels.common.kernel_launch import is_capturing
from ..kernels.common.pretended_tensors import PLAIN_WEIGHTS
from ..kernels.experts.routed_experts import unsupported_experts_reason
from ..kernels.norm_rope_linear.absorbed_vector import takes_absorbed_vector
from .attention.attention_backends import TRITON_ATTENTION
from .layers.block_fp8_modules import BlockFp8Experts, is_plain_block_fp8, why_not_block_fp8_experts
from .layers.few_token_linears import is_plain_linear
from .parallel.layer_placement import device_of_inputs, device_of_layer, device_ranges
from .parallel.module_hooks import hooks_of, is_foreign, is_own, is_watched, is_wrapped, placement_of, runs_as_written

logger = logging.get_logger(__name__)

# Experts implementations of transformers that the kernels replace; any other was chosen by the user.
_REPLACED = ("grouped_mm", "batched_mm")
_OUTPUTS = ("hidden_states", "attentions", "router_logits", "topk_indices")


def why_not_streamed(module: Any, hidden_states: torch.Tensor) -> str | None:
    """Why `attend_streamed` does not serve this forward of an `IndexCacheAttention`."""
    if torch.is_grad_enabled():
        return "gradients are wanted"
    if torch.compiler.is_compiling() and not _runs_vectors(module, hidden_states):
        return "torch.compile traces more than one or two tokens"
    if _autocasts(hidden_states.device):
        return "autocast is on"
    if module.config._attn_implementation == "eager":
        return 'attn_implementation is "eager"'
    if module.training and module.config.attention_dropout:
        return "attention has dropout"
    return None


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _runs_vectors(module: Any, hidden_states: torch.Tensor) -> bool:
    """Whether the kernels for one or two tokens serve, none of which writes into a view."""
    return (
        module.config._attn_implementation == TRITON_ATTENTION
        and is_plain_linear(module.kv_b_proj)
        and takes_absorbed_vector(hidden_states, module.kv_b_proj.weight)
    )


def why_not_in_place(module: nn.Module, device: torch.device) -> str | None:
    """Why a module's work on tensors of `device` may not happen in place: who differentiates, traces or watches it."""
    if torch.is_grad_enabled():
        return "gradients are wanted"
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if _autocasts(device):
        return "autocast is on"
    if not is_own(module):
        return f"{type(module).__name__} stands in its place"
    if "forward" in vars(module):
        placement = placement_of(module)
        if placement is None:
            return "its forward was replaced"
        if placement.device != device:
            return f"accelerate moves its inputs from {device} to {placement.device}"
    if is_watched(module):
        return "a hook watches it"
    return None


def works_in_place(module: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether a module's work on `hidden_states` may happen in place; see `why_not_in_place`."""
    return why_not_in_place(module, hidden_states.device) is None


def why_layers_keep_inputs(layers: Any, device: torch.device) -> str | None:
    """Why layers may not overwrite their inputs, the first of which are on `device`: somebody may keep one."""
    for index, layer in enumerate(layers):
        placement = placement_of(layer)
        where = device if placement is None else placement.device
        reason = why_not_in_place(layer, where)
        if reason is not None:
            return f"layers.{index}: {reason}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            reason = why_not_in_place(getattr(layer, name), where)
            if reason is not None:
                return f"layers.{index}.{name}: {reason}"
    return None


def prefills_in_place(model: Any, hidden_states: torch.Tensor) -> bool:
    """Whether a decoder's layers may overwrite their inputs; if they might have and may not, it is said once why."""
    reason = why_layers_keep_inputs(model.layers, hidden_states.device)
    if reason is not None:
        say_slower(model, hidden_states, "prefill keeps every layer's input", reason)
    return reason is None


def say_slower(module: Any, hidden_states: torch.Tensor, what: str, reason: str) -> None:
    """Say once that a fast path is off, and why, where one expects it: on CUDA, without gradient, with kernels."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not hidden_states.is_cuda:
        return
    if module.config._attn_implementation == TRITON_ATTENTION:
        logger.warning_once(f"IndexCache: {what}: {reason}. model.explain_paths() tells what runs")


def why_not_expert_kernels(module: Any, tokens: torch.Tensor) -> str | None:
    """Why `kernels.routed_experts` does not serve this mixture of experts, as its weights and hooks stand."""
    experts, shared, config = module.experts, module.shared_experts, module.config
    if config._attn_implementation != TRITON_ATTENTION:
        return f"attn_implementation is {config._attn_implementation!r}"
    if config._experts_implementation not in _REPLACED:
        return f"experts_implementation is {config._experts_implementation!r}"
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act!r}"
    for name, part in (("experts", experts), ("shared_experts", shared)):
        if not is_own(part):
            return f"{name}: {type(part).__name__} stands in its place"
        if not runs_as_written(part):
            return f"{name}: {_why_not_as_written(part)}"
    if getattr(experts, "_is_expert_parallel", False):
        return "experts are spread over ranks"
    weights = experts.gate_up_proj, experts.down_proj
    if not all(type(weight) in PLAIN_WEIGHTS for weight in weights):
        return f"experts are kept as {type(weights[0]).__name__}"
    if weights[0].device != tokens.device:
        return f"experts are on {weights[0].device}, their tokens on {tokens.device}"
    if isinstance(experts, BlockFp8Experts):
        return why_not_block_fp8_experts(experts, (shared.gate_proj, shared.up_proj, shared.down_proj), tokens)
    for name in ("gate_proj", "up_proj", "down_proj"):
        if not is_plain_linear(getattr(shared, name)):
            return f"shared_experts.{name}: {why_not_plain_linear(getattr(shared, name))}"
    return unsupported_experts_reason(tokens, *weights)


def why_not_plain_linear(module: nn.Module) -> str | None:
    """Why `module.weight` is not, as it stands, all that a linear layer computes."""
    if is_plain_linear(module):
        return None
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} stands in its place"
    if type(module.weight) not in PLAIN_WEIGHTS:
        return f"its weight is kept as {type(module.weight).__name__}"
    return _why_not_as_written(module)


def _why_not_as_written(module: nn.Module) -> str | None:
    if is_wrapped(module):
        return "its forward was replaced"
    placement = placement_of(module)
    if placement is not None and placement.offloads:
        return "accelerate keeps its weights elsewhere between calls"
    return "a hook watches it" if hooks_of(module) else None


def why_not_plain_step(
    model: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this is no decoding step that could come from a graph, seen from outside; cheap, asked at every step."""
    config = model.config
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if hidden_states.shape[1] != 1:
        return "a graph decodes one token at a time"
    if not model.decode_graphs:
        return "decode_graphs is off"
    if not device_takes_graphs(hidden_states):
        return "CUDA graphs need a CUDA device, and no other recording in progress"
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        return "only dynamic and static caches that stay on their device are recorded"
    if len(cache.layers) != config.num_hidden_layers:
        return f"the cache has {len(cache.layers)} layers and the model {config.num_hidden_layers}"
    if model.training or torch.is_grad_enabled():
        return "the model trains, or gradients are wanted"
    if _autocasts(hidden_states.device):
        return "autocast is on"
    if config.index_topk is None:
        return "no layer selects keys"
    if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2):
        return "the mask is not [batch, tokens]"
    if any(kwargs.get(f"output_{name}", getattr(config, f"output_{name}", False)) for name in _OUTPUTS):
        return "layers' outputs are wanted"
    return None if kwargs.get("indexer_training") is None else "the indexer trains"


def device_takes_graphs(hidden_states: torch.Tensor) -> bool:
    """Whether what runs on this tensor's device can be recorded now."""
    return hidden_states.is_cuda and not is_capturing(hidden_states)


def why_not_recorded(model: Any, hidden_states: torch.Tensor) -> str | None:
    """Why a decoder's steps cannot be recorded, as its layers stand; looks at every module, asked once a cache."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes run the model"
    if model.config._attn_implementation != TRITON_ATTENTION:
        return f"attn_implementation is {model.config._attn_implementation!r}"
    for name, module in model.named_modules():
        if is_wrapped(module) or any(map(is_foreign, hooks_of(module))):
            return f"{name or 'the model'}: {_why_not_as_written(module)}"
        placement = placement_of(module)
        if placement is not None and placement.offloads and name.startswith("layers."):
            return f"{name}: accelerate keeps its weights elsewhere between calls"
    for index, layer in enumerate(model.layers):
        if not is_own(layer) or not is_own(layer.mlp):
            return f"layers.{index}: a module of another class stands in its place"
        placement = placement_of(layer)
        device = hidden_states.device if placement is None else placement.device
        elsewhere = next((p.device for p in layer.parameters() if p.device != device), None)
        if elsewhere is not None:
            return f"layers.{index}: weights are on {elsewhere}, and it runs on {device}"
        if hasattr(layer.mlp, "experts"):
            tokens = hidden_states.new_empty(hidden_states.shape[:-1].numel(), hidden_states.shape[-1], device=device)
            reason = why_not_expert_kernels(layer.mlp, tokens)
            if reason is not None:
                return f"layers.{index}.mlp: {reason}"
    return None


def why_no_graphs(model: Any) -> str | None:
    """Why decoding steps of this decoder cannot come from graphs, as it stands now."""
    if not model.decode_graphs:
        return "decode_graphs is off"
    if model.config.index_topk is None:
        return "no layer selects keys"
    one = _one_token(model)
    if not device_takes_graphs(one):
        return "CUDA graphs need a CUDA device, and no other recording in progress"
    return why_not_recorded(model, one)


def _one_token(model: Any) -> torch.Tensor:
    """The hidden state of one token, `[1, 1, hidden_size]`, where a decoder's embeddings come out; never read."""
    return torch.empty(1, 1, model.config.hidden_size, dtype=model.dtype, device=device_of_inputs(model))


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
    first = _one_token(model)
    slow, inputs, parts, device = _Reasons(), _Reasons(), _Reasons(), first.device
    for index, layer in enumerate(model.layers):
        device = device_of_layer(layer, device)
        keeps = why_layers_keep_inputs([layer], device)
        inputs.add(index, keeps and keeps.removeprefix("layers.0").lstrip(".: "))
        if not is_own(layer):
            slow.add(index, f"{type(layer).__name__} stands in its place")
            continue
        attention = layer.self_attn
        reason = why_not_in_place(attention, device)
        if reason is None:
            like = first.new_empty(first.shape, device="meta")
            reason = why_not_streamed(attention, like)
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
        if part is not None and not is_plain_block_fp8(part) and (reason := why_not_plain_linear(part)):
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
