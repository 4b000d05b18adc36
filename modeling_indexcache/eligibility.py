"""Which path a forward takes, and why not a faster one: every such question is asked here, and answers carry reasons.

A function `why_x` or `why_not_x` returns what stands against a fast path, or None. `explain_paths.py` asks for a whole
model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.utils import logging

from ..kernels.block_fp8.block_fp8_linear import why_no_kernels
from ..kernels.common.kernel_launch import are_recorded, is_capturing
from ..kernels.common.pretended_tensors import PLAIN_WEIGHTS
from ..kernels.experts.routed_experts import unsupported_experts_reason
from ..kernels.norm_rope_linear.absorbed_vector import takes_absorbed_vector
from ..kernels.norm_rope_linear.vector_linear import takes_wide_vector_linear
from .attention.attention_backends import EAGER_ATTENTION, TRITON_ATTENTION
from .layers.block_fp8_modules import BlockFp8Experts, BlockFp8Linear
from .layers.normalization import IndexCacheRMSNorm
from .parallel.layer_placement import device_of_inputs, is_visiting
from .parallel.module_hooks import hooks_of, is_foreign, is_own, placement_of, recording

logger = logging.get_logger(__name__)

# Experts implementations of transformers that the kernels replace; any other was chosen by the user.
_REPLACED = ("grouped_mm", "batched_mm")
_ELSEWHERE, _WATCHED = "accelerate keeps its weights elsewhere between calls", "a hook watches it"
_GRADIENTS, _COMPILED, _AUTOCAST = "gradients are wanted", "torch.compile traces it", "autocast is on"
# From so many tokens on an fp32 weight that meets bf16 rows is multiplied in bf16 parts.
LEAST_PARTED_TOKENS = 1024


def is_fast(what: str, reason: str | None, module: Any, hidden_states: torch.Tensor) -> bool:
    """Whether there is no `reason` against a fast path; else it is said once `what` is slow without it, and why."""
    if reason is not None:
        say_slower(module, hidden_states, what, reason)
    return reason is None


def say_slower(module: Any, hidden_states: torch.Tensor, what: str, reason: str) -> None:
    """Say once that a fast path is off, and why, where one expects it: on CUDA, without gradient, with kernels."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not hidden_states.is_cuda:
        return
    if why_not_triton(module.config) is None:
        logger.warning_once(f"IndexCache: {what}: {reason}. model.explain_paths() says what runs")


def why_not_triton(config: Any) -> str | None:
    """Why a model with this config does not run the kernels."""
    backend = config._attn_implementation
    return None if backend == TRITON_ATTENTION else f"attn_implementation is {backend!r}"


# ---- modules ------------------------------------------------------------------------------------------------------


def why_not_as_written(module: nn.Module) -> str | None:
    """Why a call of `module` is not its class's forward alone, on weights that are there."""
    if "forward" in vars(module):
        placement = placement_of(module)
        if placement is None:
            return "its forward was replaced"
        if placement.offloads:
            return _ELSEWHERE
    return _WATCHED if hooks_of(module) else None


def why_not_plain(module: Any, kind: type[nn.Module] = nn.Linear) -> str | None:
    """Why a `module` is not a `kind` that computes by its `weight`, as it stands, and a bias or epsilon at most."""
    if type(module) is not kind:
        return f"replaced by {type(module).__name__}"
    if type(module.weight) not in PLAIN_WEIGHTS:
        return f"its weight is kept as {type(module.weight).__name__}"
    return why_not_as_written(module)


def is_plain_linear(module: Any) -> bool:
    """Whether a linear layer's weight is all that it computes by, but for a bias; see `why_not_plain`."""
    return why_not_plain(module) is None


def is_plain_block_fp8(module: Any) -> bool:
    """Whether weight and scales of a block fp8 layer are all that it computes by, but for a bias."""
    return why_not_plain(module, BlockFp8Linear) is None and type(module.weight_scale_inv) in PLAIN_WEIGHTS


def is_plain_norm(module: Any) -> bool:
    """Whether an RMSNorm does nothing but norm by its weight; see `why_not_plain`."""
    return why_not_plain(module, IndexCacheRMSNorm) is None


def is_plain_layer_norm(module: Any) -> bool:
    """Whether a LayerNorm does nothing but norm by its weight and bias; see `why_not_plain`."""
    return why_not_plain(module, nn.LayerNorm) is None


def why_not_wide_vectors(config: Any, linear: Any, rows: torch.Tensor) -> str | None:
    """Why fp32 outputs of a linear layer for a few `rows [T, D]` take more than one launch."""
    if reason := why_not_triton(config) or why_not_plain(linear):
        return reason
    if linear.bias is not None:
        return "it has a bias"
    return None if takes_wide_vector_linear(rows, linear.weight) else "too many tokens, or tensors not for the kernel"


def why_not_in_parts(linear: Any, rows: torch.Tensor) -> str | None:
    """Why an fp32 weight is not taken apart into three of bf16, as pays off for many bf16 `rows [T, D]` on a GPU."""
    if torch.compiler.is_compiling():
        return _COMPILED
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or rows.shape[0] < LEAST_PARTED_TOKENS:
        return f"it takes {LEAST_PARTED_TOKENS} tokens in bf16 on CUDA"
    if torch.version.hip is not None:
        return "torch.mm(..., out_dtype=) needs CUDA"
    if reason := why_not_plain(linear):
        return reason
    fits = linear.weight.dtype == torch.float32 and linear.bias is None
    return None if fits else "its weight is not fp32, or it has a bias"


def why_not_kept(linear: nn.Module) -> str | None:
    """Why the weight that a linear layer's calls amount to is made anew for every forward."""
    if torch.is_grad_enabled():
        return _GRADIENTS
    if torch.compiler.is_compiling():
        return _COMPILED
    if is_visiting(linear):
        return _ELSEWHERE
    for hook in (hook for part in linear.modules() for hook in hooks_of(part)):
        # Hooks by which transformers shards a module are part of what it computes.
        if not getattr(getattr(hook, "func", hook), "__module__", "").startswith("transformers."):
            return _WATCHED
    return None


def why_noticed(module: nn.Module) -> str | None:
    """Who would notice on which rows, how often or by whom what `module` computes is computed.

    Recorders that transformers leaves behind notice nothing while they record nothing.
    """
    if not is_own(module):
        return f"replaced by {type(module).__name__}"
    if "forward" in vars(module) and placement_of(module) is None:
        return "its forward was replaced"
    if module._compiled_call_impl is not None:
        return "it is compiled by itself"
    return why_watched(module)


def why_watched(module: nn.Module) -> str | None:
    """Which hooks of a module want to see what it makes."""
    hooks = hooks_of(module)
    return _WATCHED if hooks and (recording() or any(map(is_foreign, hooks))) else None


def why_not_in_place(module: nn.Module, device: torch.device) -> str | None:
    """Why a module's work on tensors of `device` may not happen in place, or outside of it."""
    if "forward" in vars(module):
        placement = placement_of(module)
        if placement is not None and placement.device != device:
            return f"accelerate moves its inputs from {device} to {placement.device}"
    return why_noticed(module)


def why_not_router_kernel(router: Any, norm: Any) -> str | None:
    """Why a norm and the router behind it may not be one launch."""
    if reason := why_not_triton(router.config):
        return reason
    placement = placement_of(router)
    if placement is not None and placement.offloads:
        return _ELSEWHERE
    return why_noticed(router) or why_not_plain(norm, IndexCacheRMSNorm)


def why_not_expert_kernels(module: Any, tokens: torch.Tensor) -> str | None:
    """Why `kernels.routed_experts` does not serve this mixture of experts, as its weights and hooks stand."""
    experts, shared, config = module.experts, module.shared_experts, module.config
    if reason := why_not_triton(config):
        return reason
    if config._experts_implementation not in _REPLACED:
        return f"experts_implementation is {config._experts_implementation!r}"
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act!r}"
    for name, part in (("experts", experts), ("shared_experts", shared)):
        if not is_own(part):
            return f"{name}: replaced by {type(part).__name__}"
        if reason := why_not_as_written(part):
            return f"{name}: {reason}"
    if getattr(experts, "_is_expert_parallel", False):
        return "experts are spread over ranks"
    weights = experts.gate_up_proj, experts.down_proj
    if not all(type(weight) in PLAIN_WEIGHTS for weight in weights):
        return f"experts are kept as {type(weights[0]).__name__}"
    if weights[0].device != tokens.device:
        return f"experts are on {weights[0].device}, their tokens on {tokens.device}"
    if isinstance(experts, BlockFp8Experts):
        return _why_not_block_fp8_kernels(experts, shared, tokens)
    for name in ("gate_proj", "up_proj", "down_proj"):
        if reason := why_not_plain(getattr(shared, name)):
            return f"shared_experts.{name}: {reason}"
    return unsupported_experts_reason(tokens, *weights)


def _why_not_block_fp8_kernels(experts: BlockFp8Experts, shared: Any, tokens: torch.Tensor) -> str | None:
    """Why the block fp8 kernels do not serve these experts and the shared one, with their tokens."""
    scales = experts.down_proj_scale_inv.dtype
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(shared, name)
        if not is_plain_block_fp8(layer) or layer.bias is not None:
            return f"shared_experts.{name} is no plain block fp8 layer, as the routed experts are"
        if layer.block_size != experts.block_size or layer.weight_scale_inv.dtype != scales:
            return f"shared_experts.{name} has other blocks or scales than the routed experts"
    if not tokens.is_cuda:
        return "the kernels need a CUDA device"
    if torch.is_grad_enabled() and tokens.requires_grad:
        return "the kernels have no gradient"
    return why_no_kernels(tokens, experts.block_size, *experts.parameters())


# ---- forwards -----------------------------------------------------------------------------------------------------


def why_not_fused(hidden_states: torch.Tensor) -> str | None:
    """Why this forward runs module by module: who differentiates, traces or casts it."""
    if torch.is_grad_enabled():
        return _GRADIENTS
    if torch.compiler.is_compiling():
        return _COMPILED
    return _AUTOCAST if _autocasts(hidden_states.device) else None


def why_not_streamed(model: Any, hidden_states: torch.Tensor) -> str | None:
    """Why attention makes queries and outputs of all tokens of this forward at once."""
    reason = why_not_fused(hidden_states)
    if reason == _COMPILED and not _autocasts(hidden_states.device):
        reason = None if _runs_vectors(model, hidden_states) else "torch.compile traces more than one or two tokens"
    if reason is None and model.config._attn_implementation == EAGER_ATTENTION:
        return 'attn_implementation is "eager"'
    if reason is None and model.training and model.config.attention_dropout:
        return "attention has dropout"
    return reason


def _autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device or for those that other layers may be on."""
    kinds = ("cpu", "cuda") if device.type in ("cpu", "cuda", "meta") else ("cpu", "cuda", device.type)
    return any(map(torch.is_autocast_enabled, kinds))


def _runs_vectors(model: Any, hidden_states: torch.Tensor) -> bool:
    """Whether the kernels for one or two tokens serve, none of which writes into a view."""
    if why_not_triton(model.config):
        return False
    attentions = [getattr(layer, "self_attn", None) for layer in model.layers]
    expanding: list[Any] = [getattr(attention, "kv_b_proj", None) for attention in attentions]
    return all(is_plain_linear(p) and takes_absorbed_vector(hidden_states, p.weight) for p in expanding)


def why_layers_keep_inputs(layers: Any, device: torch.device) -> str | None:
    """Why layers may not overwrite their inputs, the first of which are on `device`: somebody may keep one."""
    for index, layer in enumerate(layers):
        placement = placement_of(layer)
        where = device if placement is None else placement.device
        if reason := why_not_in_place(layer, where):
            return f"layers.{index}: {reason}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            if reason := why_not_in_place(getattr(layer, name), where):
                return f"layers.{index}.{name}: {reason}"
    return None


def why_not_plain_step(
    model: Any, hidden_states: torch.Tensor, attention_mask: Any, cache: Any, options: Any
) -> str | None:
    """Why this is no decoding step that could come from a graph, seen from outside; cheap, asked at every step."""
    if torch.compiler.is_compiling():
        return _COMPILED
    if hidden_states.shape[1] != 1:
        return "a graph decodes one token at a time"
    if reason := _why_not_in_graphs(model, hidden_states):
        return reason
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        return "only dynamic and static caches that stay on their device are recorded"
    if len(cache.layers) != model.config.num_hidden_layers:
        return f"the cache has {len(cache.layers)} layers and the model {model.config.num_hidden_layers}"
    if model.training or torch.is_grad_enabled():
        return "the model trains, or gradients are wanted"
    if _autocasts(hidden_states.device):
        return _AUTOCAST
    if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2):
        return "the mask is not [batch, tokens]"
    if options.outputs:
        return "layers' outputs are wanted"
    return None if options.training is None else "the indexer trains"


def _why_not_in_graphs(model: Any, hidden_states: torch.Tensor) -> str | None:
    """What of a decoder and a device speaks against graphs, whatever the step."""
    if not model.decode_graphs:
        return "decode_graphs is off"
    if model.config.index_topk is None:
        return "no layer selects keys"
    takes = device_takes_graphs(hidden_states)
    return None if takes else "CUDA graphs need a CUDA device, and no other recording in progress"


def device_takes_graphs(hidden_states: torch.Tensor) -> bool:
    """Whether what runs on this tensor's device can be recorded now."""
    return hidden_states.is_cuda and not is_capturing(hidden_states)


def why_not_recorded(model: Any, hidden_states: torch.Tensor) -> str | None:
    """Why a decoder's steps cannot be recorded, as its layers stand; looks at every module, asked once a cache."""
    if reason := _why_not_alone() or why_not_triton(model.config):
        return reason
    for name, module in model.named_modules():
        placement = placement_of(module)
        is_wrapped = "forward" in vars(module) and placement is None
        if is_wrapped or any(map(is_foreign, hooks_of(module))):
            return f"{name or 'the model'}: {why_not_as_written(module)}"
        if placement is not None and placement.offloads and name.startswith("layers."):
            return f"{name}: {_ELSEWHERE}"
    for index, layer in enumerate(model.layers):
        if not is_own(layer) or not is_own(layer.mlp):
            return f"layers.{index}: replaced by a module of another class"
        placement = placement_of(layer)
        device = hidden_states.device if placement is None else placement.device
        elsewhere = next((p.device for p in layer.parameters() if p.device != device), None)
        if elsewhere is not None:
            return f"layers.{index}: weights are on {elsewhere}, and it runs on {device}"
        if hasattr(layer.mlp, "experts"):
            tokens = hidden_states.new_empty(hidden_states.shape[:-1].numel(), hidden_states.shape[-1], device=device)
            if reason := why_not_expert_kernels(layer.mlp, tokens):
                return f"layers.{index}.mlp: {reason}"
    return None


def why_no_graphs(model: Any) -> str | None:
    """Why decoding steps of this decoder cannot come from graphs, as it stands now."""
    one = one_token(model)
    return _why_not_in_graphs(model, one) or why_not_recorded(model, one)


def why_not_compiled_ahead(model: Any, hidden_states: torch.Tensor) -> str | None:
    """Why a decoder's kernels are not compiled in the background: none will run, or not all are known."""
    if not hidden_states.is_cuda or are_recorded():
        return "kernels are launched on CUDA alone, and not while launches are recorded"
    if torch.is_grad_enabled():
        return _GRADIENTS
    if torch.compiler.is_compiling():
        return _COMPILED
    if model.config.index_topk is None:
        return "no layer selects keys"
    if hidden_states.dtype not in (torch.bfloat16, torch.float16):
        return f"kernels take half precision, not {hidden_states.dtype}"
    return why_not_triton(model.config) or _why_not_alone()


def _why_not_alone() -> str | None:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return "several processes run the model" if several else None


def one_token(model: Any) -> torch.Tensor:
    """The hidden state of one token, `[1, 1, hidden_size]`, where a decoder's embeddings come out; never read."""
    return torch.empty(1, 1, model.config.hidden_size, dtype=model.dtype, device=device_of_inputs(model))
