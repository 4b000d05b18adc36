"""The distillation operations and their gradients: which backends they have, and how autograd finds the gradients.

The Triton kernels are custom operations with gradients of their own; PyTorch's autograd differentiates the references.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..common.custom_op import custom_op, differentiable_again
from ..common.device_target import why_too_old
from ..common.dispatch import Backend, Operation, takes_all
from ..common.triton_support import HALF_PRECISION
from .indexer_distillation_dense_triton import dense_kl_backward_triton, dense_kl_triton
from .indexer_distillation_reference import (
    attention_lse_reference,
    dense_indexer_kl_reference,
    indexer_kl_reference,
    selected_attention_reference,
    selected_index_scores_reference,
)
from .indexer_distillation_teacher_triton import attention_lse_triton
from .indexer_distillation_triton import (
    index_backward_triton,
    indexer_kl_triton,
    selected_attention_triton,
    selected_scores_triton,
)

# Heads, head width, selected keys and latent width that the Triton kernels are tested for.
_MAX_HEADS, _MAX_INDEX_WIDTH, _MAX_TOPK, _MAX_LATENT_WIDTH = 128, 256, 8192, 576


def _fp32(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _gradient_shapes(grad, q, k, weights, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, weights))


@custom_op(_gradient_shapes)
def _index_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    target: torch.Tensor | None,
    stats: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and weights, of the scores or (with a target) of the KL."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _INDEX_GRADIENT(q.device, grad, q, k, weights, indices, target, stats, scale, deterministic)


def _index_backward_in_pytorch(grad, q, k, weights, indices, target, stats, scale, deterministic):
    def run(*inputs):
        if target is None:
            return selected_index_scores_reference(*inputs, indices, scale)
        return indexer_kl_reference(*inputs, indices, target, scale)

    return _gradients_in_pytorch(run, grad, q, k, weights)


def _gradients_in_pytorch(function: Callable[..., torch.Tensor], grad: torch.Tensor, *inputs: torch.Tensor) -> tuple:
    with differentiable_again():
        leaves = [x.detach().requires_grad_() for x in inputs]
        result = function(*leaves)
        # What is minus infinity depends on nothing.
        grad = grad.to(result.dtype).masked_fill(result == float("-inf"), 0.0)
        gradients = torch.autograd.grad(result, leaves, grad)
    return tuple(x.contiguous() for x in gradients)


def _keep_for_scores(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_scores(ctx, grad):
    return *_index_backward(grad, *ctx.saved_tensors, None, None, ctx.scale), None, None


def _keep_for_kl(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate_kl(ctx, grad, _):
    return *_index_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


@custom_op(_gradient_shapes)
def _dense_indexer_kl_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    q_attn: list[torch.Tensor],
    kv: list[torch.Tensor],
    attn_lse: list[torch.Tensor],
    lse: torch.Tensor,
    scale: float,
    attn_scale: float,
    query_start: torch.Tensor,
    key_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    visible = (query_start, key_start, key_mask)
    return _DENSE_GRADIENT(q.device, grad, q, k, weights, q_attn, kv, attn_lse, lse, scale, attn_scale, *visible)


def _dense_backward_in_pytorch(grad, q, k, weights, q_attn, kv, attn_lse, lse, *rest):
    def run(*inputs):
        return dense_indexer_kl_reference(*inputs, q_attn, kv, attn_lse, *rest)

    return _gradients_in_pytorch(run, grad, q, k, weights)


def _keep_for_dense_kl(ctx, inputs, output):
    q, k, weights, q_attn, kv, attn_lse, ctx.scale, ctx.attn_scale, *visible = inputs
    ctx.layers = len(q_attn)
    ctx.save_for_backward(q, k, weights, *visible, output[1], *q_attn, *kv, *attn_lse)


def _differentiate_dense_kl(ctx, grad, _):
    q, k, weights, *rest = ctx.saved_tensors
    visible, lse, layers, n = rest[:3], rest[3], rest[4:], ctx.layers
    attention = (layers[:n], layers[n : 2 * n], layers[2 * n :])
    scales = (ctx.scale, ctx.attn_scale)
    gradients = _dense_indexer_kl_backward(grad, q, k, weights, *attention, lse, *scales, *visible)
    return *gradients, *([None] * n for _ in range(3)), None, None, None, None, None


def _per_entry(q, keys, third, indices, *_):
    return _fp32(q, *indices.shape)


_selected_index_scores = custom_op(_per_entry, _differentiate_scores, _keep_for_scores)(selected_scores_triton)
_indexer_kl = custom_op(
    lambda q, *_: (_fp32(q, *q.shape[:2]), _fp32(q, 2, *q.shape[:2])), _differentiate_kl, _keep_for_kl
)(indexer_kl_triton)
_selected_attention = custom_op(_per_entry)(selected_attention_triton)
_attention_lse = custom_op(lambda q, *_: _fp32(q, *q.shape[:3]))(attention_lse_triton)
_dense_indexer_kl = custom_op(
    lambda q, *_: (_fp32(q, *q.shape[:2]), _fp32(q, *q.shape[:2])), _differentiate_dense_kl, _keep_for_dense_kl
)(dense_kl_triton)


def _why_not(q: torch.Tensor, keys: torch.Tensor, max_width: int, topk: int = 0) -> str | None:
    """Why the kernels do not take queries `[B, S, H, D]` and keys `[B, T, D]`, `topk` of which are listed, or None."""
    _, _, heads, width = q.shape
    if q.dtype not in HALF_PRECISION or keys.dtype != q.dtype:
        return f"the kernels take bfloat16 or float16 queries and keys of one dtype, not {q.dtype} and {keys.dtype}"
    if heads > _MAX_HEADS or width > max_width:
        return f"{heads} heads or width {width} is above {_MAX_HEADS}, {max_width}"
    if topk > _MAX_TOPK:
        return f"{topk} selected keys are above {_MAX_TOPK}"
    return why_too_old(q.device)


def _why_not_index(q, k, weights, indices, *_) -> str | None:
    return _why_not(q, k, _MAX_INDEX_WIDTH, indices.shape[-1])


def _why_not_attention(q, kv, lse, indices, scale) -> str | None:
    return _why_not(q, kv, _MAX_LATENT_WIDTH, indices.shape[-1])


def _why_not_dense(q, k, weights, q_attn, kv, *_) -> str | None:
    reasons = (_why_not(*layer, _MAX_LATENT_WIDTH) for layer in zip(q_attn, kv))
    return _why_not(q, k, _MAX_INDEX_WIDTH) or next(filter(None, reasons), None)


def _index(new: Callable[..., torch.Tensor]) -> tuple:
    """Queries, keys, weights and lists of typical shapes."""
    return new(1, 2048, 32, 128), new(1, 8192, 128), new(1, 2048, 32), new(1, 2048, 2048, dtype=torch.int32)


def _latents(new: Callable[..., torch.Tensor]) -> tuple:
    return new(1, 2048, 20, 576), new(1, 8192, 576)


def _dense(new: Callable[..., torch.Tensor], *lse: Any) -> tuple:
    (q, kv), start = _latents(new), new(1, dtype=torch.int64)
    return *_index(new)[:3], [q], [kv], [new(1, 2048, 20)], *lse, 1.0, 1.0, start, None, None


def _index_gradient(new: Callable[..., torch.Tensor]) -> tuple:
    stats = new(2, 1, 2048, dtype=torch.float32)
    return new(1, 2048), *_index(new), new(1, 2048, 2048), stats, 1.0, False


SCORES = Operation(
    "selected_index_scores",
    Backend("Triton", _why_not_index, _selected_index_scores),
    Backend("PyTorch", takes_all, selected_index_scores_reference),
    training=lambda new: (*_index(new), 1.0),
)
KL = Operation(
    "indexer_kl",
    Backend("Triton", _why_not_index, lambda *arguments: _indexer_kl(*arguments)[0]),
    Backend("PyTorch", takes_all, indexer_kl_reference),
    training=lambda new: (*_index(new), new(1, 2048, 2048), 1.0),
)
_INDEX_GRADIENT = Operation(
    "indexer_kl's gradient",
    Backend("Triton", takes_all, index_backward_triton),
    Backend("PyTorch", takes_all, _index_backward_in_pytorch),
    training=_index_gradient,
)
ATTENTION = Operation(
    "selected_attention",
    Backend("Triton", _why_not_attention, _selected_attention),
    Backend("PyTorch", takes_all, selected_attention_reference),
    training=lambda new: (*_latents(new), new(1, 2048, 20), _index(new)[3], 1.0),
)
LSE = Operation(
    "attention_lse",
    Backend("Triton", lambda q, kv, *_: _why_not(q, kv, _MAX_LATENT_WIDTH), _attention_lse),
    Backend("PyTorch", takes_all, attention_lse_reference),
    training=lambda new: (*_latents(new), 1.0, new(1, dtype=torch.int64), None, None),
)
DENSE_KL = Operation(
    "dense_indexer_kl",
    Backend("Triton", _why_not_dense, lambda *arguments: _dense_indexer_kl(*arguments)[0]),
    Backend("PyTorch", takes_all, dense_indexer_kl_reference),
    training=_dense,
)
_DENSE_GRADIENT = Operation(
    "dense_indexer_kl's gradient",
    Backend("Triton", takes_all, dense_kl_backward_triton),
    Backend("PyTorch", takes_all, _dense_backward_in_pytorch),
    training=lambda new: (new(1, 2048), *_dense(new, new(1, 2048, dtype=torch.float32))),
)
