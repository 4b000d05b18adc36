"""Modules whose weights are block fp8: linear layers and routed experts, stored and run as the checkpoint has them.

Their weights are frozen. Gradients reach what lies before them through the dequantised weight, so that adapters train.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...kernels.block_fp8.block_fp8_experts import block_fp8_experts
from ...kernels.block_fp8.block_fp8_format import E4M3, dequantise, scale_grid
from ...kernels.block_fp8.block_fp8_linear import block_fp8_linear
from ..attention.attention_backends import TRITON_ATTENTION

BlockSize = tuple[int, int]


class BlockFp8Linear(nn.Linear):
    """A linear layer in block fp8.

    Attributes:
        weight: float8_e4m3fn `[out_features, in_features]`.
        weight_scale_inv: what each block of `block_size` rows and columns is multiplied by, fp32 or float8_e8m0fnu.
    """

    # Transformers: sharded by tensor parallel as plain tensors, not as DTensors.
    _hf_quantized_needs_local_tp = True

    def __init__(
        self,
        config: IndexCacheConfig,
        in_features: int,
        out_features: int,
        bias: bool,
        block_size: BlockSize,
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.config, self.block_size = config, block_size
        self.weight = _frozen(out_features, in_features, dtype=E4M3)
        self.weight_scale_inv = _frozen(*scale_grid(out_features, in_features, block_size), dtype=scale_dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: fn(tensor) if tensor is self.bias else _as_stored(fn, tensor), recurse)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        x = _as_autocast_has_it(input)
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() and rows.requires_grad:
            made = _BlockFp8Product.apply(
                rows, self.weight, self.weight_scale_inv, self.block_size, _allows_triton(self)
            )
            made = made if self.bias is None else made + self.bias
        else:
            bias = None if self.bias is None else self.bias.to(x.dtype).expand(rows.shape[0], -1)
            made = block_fp8_linear(
                rows,
                self.weight,
                self.weight_scale_inv,
                block_size=self.block_size,
                base=bias,
                allow_triton=_allows_triton(self),
            )
        return made.view(*x.shape[:-1], -1)

    def multiply_into(self, x: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        """Write the layer's output of rows `x [T, in_features]`, but for a bias, to `out`, or add it there."""
        base, size = out if add else None, self.block_size
        weight, scales = self.weight, self.weight_scale_inv
        block_fp8_linear(x, weight, scales, block_size=size, base=base, out=out, allow_triton=_allows_triton(self))

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[out_features, in_features]` in `dtype`, made anew."""
        return dequantise(self.weight, self.weight_scale_inv, self.block_size, dtype)


class BlockFp8Experts(nn.Module):
    """The routed experts' weights in block fp8, stacked.

    Attributes:
        gate_up_proj: float8_e4m3fn `[E, 2 I, D]`, gate above up.
        gate_up_proj_scale_inv: the scales of the gates' blocks above those of up, `[E, 2 ceil(I / rows), ...]`.
        down_proj: float8_e4m3fn `[E, D, I]`.
        down_proj_scale_inv: its blocks' scales.
    """

    _hf_quantized_needs_local_tp = True

    def __init__(
        self, config: IndexCacheConfig, block_size: BlockSize, scale_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config, self.block_size = config, block_size
        self.num_experts = config.n_routed_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.moe_intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        count, inner, width = self.num_experts, self.intermediate_dim, self.hidden_dim
        down, across = scale_grid(inner, width, block_size)
        self.gate_up_proj = _frozen(count, 2 * inner, width, dtype=E4M3)
        self.gate_up_proj_scale_inv = _frozen(count, 2 * down, across, dtype=scale_dtype)
        self.down_proj = _frozen(count, width, inner, dtype=E4M3)
        self.down_proj_scale_inv = _frozen(count, *scale_grid(width, inner, block_size), dtype=scale_dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: _as_stored(fn, tensor), recurse)

    @property
    def gate_up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first product's weight and scales."""
        return self.gate_up_proj, self.gate_up_proj_scale_inv

    @property
    def down(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The second product's weight and scales."""
        return self.down_proj, self.down_proj_scale_inv

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[tokens, hidden_size]` through each token's experts."""
        x = _as_autocast_has_it(hidden_states)
        # Under expert parallelism ids of num_experts mark tokens of other ranks.
        elsewhere = top_k_index >= self.num_experts
        experts, weights = top_k_index.masked_fill(elsewhere, 0), top_k_weights.masked_fill(elsewhere, 0.0)
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
        if needs_grad or self.config.hidden_act != "silu":
            return self._one_by_one(x, experts, weights)
        return block_fp8_experts(
            x,
            experts.long(),
            weights.float(),
            self.gate_up,
            self.down,
            block_size=self.block_size,
            allow_triton=_allows_triton(self),
        )

    def _one_by_one(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """With gradient, and with any activation."""
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        allow = _allows_triton(self)
        for expert in experts.unique().tolist():
            token, position = torch.where(experts == expert)
            rows = x[token]
            gate, up = (
                _BlockFp8Product.apply(rows, weight, scales, self.block_size, allow)
                for weight, scales in zip(*(tensor[expert].chunk(2) for tensor in self.gate_up))
            )
            made = self.act_fn(gate) * up
            made = _BlockFp8Product.apply(made, *(tensor[expert] for tensor in self.down), self.block_size, allow)
            out = out.index_add(0, token, made.to(out.dtype) * weights[token, position, None].to(out.dtype))
        return out.to(x.dtype)


class _BlockFp8Product(torch.autograd.Function):
    """`block_fp8_linear` with a gradient for its activations alone."""

    @staticmethod
    def forward(ctx, x, weight, scales, block_size, allow_triton):
        ctx.save_for_backward(weight, scales)
        ctx.block_size = block_size
        return block_fp8_linear(x, weight, scales, block_size=block_size, allow_triton=allow_triton)

    @staticmethod
    def backward(ctx, grad):
        weight, scales = ctx.saved_tensors
        return grad @ dequantise(weight, scales, ctx.block_size, grad.dtype), None, None, None, None


def put_block_fp8(
    model: nn.Module, block_size: BlockSize, scale_dtype: Callable[[str, bool], torch.dtype | None]
) -> None:
    """Put block fp8 modules, without memory, in place of a model's linear layers and routed experts.

    Args:
        model: with a `config`.
        block_size: rows and columns that share a scale.
        scale_dtype: given a module's name, and whether it is experts, the dtype of its scales, or None to leave it.
    """
    config: Any = model.config
    for name, module in list(model.named_modules()):
        is_experts = hasattr(module, "gate_up_proj") and hasattr(module, "down_proj")
        if not is_experts and type(module) is not nn.Linear:
            continue
        dtype = scale_dtype(name, is_experts)
        if dtype is None:
            continue
        with torch.device("meta"):
            if is_experts:
                made: nn.Module = BlockFp8Experts(config, block_size, dtype)
            else:
                linear: Any = module
                size = linear.in_features, linear.out_features
                made = BlockFp8Linear(config, *size, linear.bias is not None, block_size, dtype)
        model.set_submodule(name, made.train(module.training))


def scales_name(name: str, is_experts: bool) -> str:
    """The name of the scales of a module's first weight, given the module's."""
    return f"{name}.gate_up_proj_scale_inv" if is_experts else f"{name}.weight_scale_inv"


def block_size_of(config: Any) -> BlockSize:
    """The blocks of a quantised model's config."""
    quantization = config.quantization_config
    size = quantization["weight_block_size"] if isinstance(quantization, dict) else quantization.weight_block_size
    return int(size[0]), int(size[1])


def run_block_fp8_experts(
    experts: BlockFp8Experts,
    shared: Sequence[nn.Module],
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    accumulate: torch.Tensor | None,
) -> torch.Tensor:
    """Routed and shared experts of `x [T, D]` in the kernels, added in place to `accumulate` if given."""
    layers: Any = shared
    gate, up, down = ((layer.weight, layer.weight_scale_inv) for layer in layers)
    return block_fp8_experts(
        x,
        chosen,
        weights,
        experts.gate_up,
        experts.down,
        shared=(gate, up, down),
        accumulate=accumulate,
        block_size=experts.block_size,
    )


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def _as_stored(fn: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """What `model.half()` and the like make of weights and scales: other dtypes would take them apart."""
    made = fn(tensor)
    return made if made.dtype == tensor.dtype else tensor.to(made.device)


def _allows_triton(module: Any) -> bool:
    return module.config._attn_implementation == TRITON_ATTENTION


def _as_autocast_has_it(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype that a linear layer would have it in under autocast."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(kind))
    return x
