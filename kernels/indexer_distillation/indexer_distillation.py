"""Distilling a lightning indexer from attention: index scores and attention of selected keys, and the KL between them.

Meaning: `indexer_distillation_reference.py`. Source: DeepSeek-V3.2 report, equations 1 to 4. Everything here is for
training: the index score is `I[t,s] = sum_h w[t,h] relu(scale q[t,h] . k[s])`, the indexer's distribution `softmax(I)`
over a query's keys, the teacher's the mean over heads of the attention probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..common.argument_checks import (
    check_floats,
    check_heads_and_keys,
    check_indices,
    check_query_start,
    check_scale,
    check_shape,
    check_tensors,
)
from ..common.device_target import has_capability
from ..common.dispatch import Backend, dispatch, takes_all
from ..common.kernel_launch import register_fake
from .indexer_distillation_dense_triton import dense_kl_backward_triton, dense_kl_triton
from .indexer_distillation_reference import (
    attention_lse_reference,
    dense_indexer_kl_reference,
    indexer_kl_reference,
    selected_attention_reference,
    selected_index_scores_reference,
)
from .indexer_distillation_teacher_triton import Visibility, attention_lse_triton
from .indexer_distillation_triton import (
    index_backward_triton,
    indexer_kl_triton,
    selected_attention_triton,
    selected_scores_triton,
    triton,
)

# The custom ops below are the Triton kernels; PyTorch's autograd differentiates the references.
# A namespace of its own for every copy of this file: the installed one and each revision loaded from the Hub.
_NAMESPACE = __name__.replace(".", "_")
# Heads, head width, selected keys and latent width that the Triton kernels are tested for.
_MAX_HEADS, _MAX_INDEX_WIDTH, _MAX_TOPK, _MAX_LATENT_WIDTH = 128, 256, 8192, 576


def selected_index_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    *,
    scale: float | None = None,
    allow_triton: bool = True,
) -> torch.Tensor:
    """Index scores of the selected keys only: `sum_h weights[h] * relu(scale * q[h] . k[indices])`.

    Args:
        q: indexer queries of shape `[B, S, H, D]`, RoPE applied; bf16, fp16, fp32 or fp64.
        k: indexer keys of shape `[B, T, D]`.
        weights: head weights of shape `[B, S, H]` (`weights_proj(x) * H**-0.5`), any float dtype.
        indices: int32 of shape `[B, S, K]`: slots in `k`, -1 where a query has fewer keys (anywhere in the row).
        scale: factor on the dot products. Default: `D**-0.5`.
        allow_triton: use the Triton kernels on CUDA where they take these arguments; False is PyTorch anywhere.

    Returns:
        `[B, S, K]` in fp32 (fp64 for fp64 inputs), minus infinity where `indices` is -1. Differentiable in `q`, `k`
        and `weights`; no gradient passes through the entries that are minus infinity.

    Raises:
        TypeError: a tensor or number that is none.
        ValueError: shapes, dtypes or devices that do not fit each other, a scale that is not positive.
        IndexError: a slot that there is no key for, on a CPU; on a GPU it is taken for -1.
    """
    _check_indexer("selected_index_scores", q, k, weights)
    check_indices("selected_index_scores", indices, q, k.shape[1])
    scale = _index_scale("selected_index_scores", q, scale)
    arguments = (q, k, weights, indices, scale)
    reason = _why_not_triton(q, k, _MAX_INDEX_WIDTH, indices)
    backends = _backends(reason, _selected_index_scores, selected_index_scores_reference)
    return _run("selected_index_scores", backends, allow_triton, arguments)


def selected_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    lse: torch.Tensor,
    indices: torch.Tensor,
    *,
    scale: float,
    allow_triton: bool = True,
) -> torch.Tensor:
    """Head-mean attention probability of each selected key: `mean_h exp(scale * q[h] . kv[indices] - lse[h])`.

    With the `lse` that `sparse_mla` returns for the same `indices`, a row sums to 1 (repeated keys count as often as
    they are listed). With `attention_lse`, it sums to the share of the full attention that the selected keys hold.

    Args:
        q: absorbed queries of shape `[B, S, H, D]`, as for `sparse_mla`.
        kv: latents of shape `[B, T, D]`.
        lse: `[B, S, H]`, natural logarithm; minus infinity for queries without keys.
        indices: int32 of shape `[B, S, K]`, -1 where a query has fewer keys.
        scale: factor on the dot products.
        allow_triton: as above.

    Returns:
        `[B, S, K]` in fp32 (fp64 for fp64 inputs), zero where `indices` is -1. No gradient flows.

    Raises:
        TypeError: a tensor or number that is none.
        ValueError: shapes, dtypes or devices that do not fit each other.
        IndexError: a slot that there is no key for, on a CPU; on a GPU it is taken for -1.
    """
    check_heads_and_keys("selected_attention", q, kv, ("q", "kv"))
    check_scale("selected_attention", scale, positive=False)
    check_indices("selected_attention", indices, q, kv.shape[1])
    _check_lse("selected_attention", lse, q)
    q, kv, lse = q.detach(), kv.detach(), lse.detach()
    arguments = (q, kv, lse, indices, scale)
    reason = _why_not_triton(q, kv, _MAX_LATENT_WIDTH, indices)
    backends = _backends(reason, _selected_attention, selected_attention_reference)
    return _run("selected_attention", backends, allow_triton, arguments)


def indexer_kl(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    target: torch.Tensor,
    *,
    scale: float | None = None,
    allow_triton: bool = True,
) -> torch.Tensor:
    """`KL(p || softmax(I))` of every query over its selected keys: the sparse-stage loss (report, equation 4).

    `I` are the `selected_index_scores` and `p` is `target` divided by its sum over the selected keys. The cost of
    several served layers is one call with their averaged target: for the indexer, the mean of the KLs and the KL to
    the mean differ by a constant (and the mean must be over rows that each sum to 1, as `selected_attention` gives).

    Args:
        q: indexer queries of shape `[B, S, H, D]`, RoPE applied; bf16, fp16, fp32 or fp64.
        k: indexer keys of shape `[B, T, D]`.
        weights: head weights of shape `[B, S, H]`, any float dtype.
        indices: int32 of shape `[B, S, K]`, -1 where a query has fewer keys.
        target: non-negative, of shape `[B, S, K]`, any float dtype; entries at -1 are ignored. No gradient flows.
        scale: factor on the dot products. Default: `D**-0.5`.
        allow_triton: as above.

    Returns:
        `[B, S]` in fp32 (fp64 for fp64 inputs), in nats. Differentiable in `q`, `k` and `weights`. Queries without
        keys, and those whose target is zero on all of them, give 0 and no gradient.

    Raises:
        TypeError: a tensor or number that is none.
        ValueError: shapes, dtypes or devices that do not fit each other.
        IndexError: a slot that there is no key for, on a CPU; on a GPU it is taken for -1.
    """
    _check_indexer("indexer_kl", q, k, weights)
    check_indices("indexer_kl", indices, q, k.shape[1])
    check_tensors("indexer_kl", q=q, target=target)
    check_shape("indexer_kl", "target", target, "[B, S, K]", indices.shape)
    check_floats("indexer_kl", target=target)
    scale, target = _index_scale("indexer_kl", q, scale), target.detach()
    arguments = (q, k, weights, indices, target, scale)
    reason = _why_not_triton(q, k, _MAX_INDEX_WIDTH, indices)
    backends = _backends(reason, lambda *args: _indexer_kl(*args)[0], indexer_kl_reference)
    return _run("indexer_kl", backends, allow_triton, arguments)


def attention_lse(
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    scale: float,
    query_start: torch.Tensor | int | None = None,
    key_start: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    allow_triton: bool = True,
) -> torch.Tensor:
    """`log sum exp(scale * q . kv)` of every query and head over all the keys that the query sees.

    What `dense_indexer_kl` computes for itself when no `attn_lse` is given, and what turns `selected_attention` into
    the recall of the attention mass. Arguments as for `dense_indexer_kl`; no gradient flows.

    Returns:
        `[B, S, H]` in fp32 (fp64 for fp64 inputs), minus infinity for queries that see nothing.
    """
    check_heads_and_keys("attention_lse", q, kv, ("q", "kv"))
    check_scale("attention_lse", scale, positive=False)
    start, key_start, key_mask = _visibility("attention_lse", q, kv.shape[1], query_start, key_start, key_mask)
    arguments = (q.detach(), kv.detach(), scale, start, key_start, key_mask)
    reason = _why_not_triton(q, kv, _MAX_LATENT_WIDTH)
    return _run("attention_lse", _backends(reason, _attention_lse, attention_lse_reference), allow_triton, arguments)


def dense_indexer_kl(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    q_attn: torch.Tensor | Sequence[torch.Tensor],
    kv: torch.Tensor | Sequence[torch.Tensor],
    *,
    scale: float | None = None,
    attn_scale: float,
    attn_lse: torch.Tensor | Sequence[torch.Tensor] | None = None,
    query_start: torch.Tensor | int | None = None,
    key_start: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    allow_triton: bool = True,
) -> torch.Tensor:
    """`KL(p || softmax(I))` of every query over all keys it sees: the dense warm-up loss (report, equation 3).

    `p` is the mean over heads, and over the served layers, of the attention probabilities. It is computed in tiles,
    forward and again backward; nothing of size `[S, T]` is kept. Several served layers cost one attention pass each
    and a single index pass: give lists. (The mean of one KL a layer has the same gradient and pays for the index
    scores once a layer.)

    A key is visible to query i of batch b when its slot is at most `query_start[b] + i`, at least `key_start[b, i]`,
    and `key_mask` allows it.

    Args:
        q: indexer queries of shape `[B, S, H, D]`, RoPE applied; bf16, fp16, fp32 or fp64.
        k: indexer keys of shape `[B, T, D]`.
        weights: head weights of shape `[B, S, H]`, any float dtype.
        q_attn: absorbed attention queries of shape `[B, S, H_attn, D_attn]`, or a list of them, one a served layer.
        kv: latents of shape `[B, T, D_attn]`, or a list as long as `q_attn`'s.
        scale: factor on the index dot products. Default: `D**-0.5`.
        attn_scale: factor on the attention dot products.
        attn_lse: `[B, S, H_attn]` from `attention_lse` or the attention itself (or a list); computed if not given.
        query_start: slot of the first query, an int or an integer tensor of shape `[]` or `[B]`. Default: `T - S`.
        key_start: int32 of shape `[B, S]`, the first slot that a query may see (packed documents). Default: 0.
        key_mask: bool of shape `[B, T]`, False for padding.
        allow_triton: as above.

    Returns:
        `[B, S]` in fp32 (fp64 for fp64 inputs), in nats. Differentiable in `q`, `k` and `weights`. Queries that see
        no key give 0 and no gradient.

    Raises:
        TypeError: a tensor or number that is none.
        ValueError: shapes, dtypes or devices that do not fit each other, lists of different lengths.
    """
    _check_indexer("dense_indexer_kl", q, k, weights)
    check_scale("dense_indexer_kl", attn_scale, positive=False, name="attn_scale")
    layers_q, layers_kv = _as_list(q_attn), _as_list(kv)
    layers_lse = None if attn_lse is None else _as_list(attn_lse)
    lengths = {len(layers_q), len(layers_kv)} | (set() if layers_lse is None else {len(layers_lse)})
    if len(lengths) != 1 or not layers_q:
        raise ValueError(
            f"dense_indexer_kl: q_attn, kv and attn_lse must be lists of one entry a served layer, got "
            f"{len(layers_q)}, {len(layers_kv)} and {'none' if layers_lse is None else len(layers_lse)}"
        )
    for index, (one_q, one_kv) in enumerate(zip(layers_q, layers_kv)):
        check_tensors("dense_indexer_kl", q=q, q_attn=one_q)
        check_heads_and_keys("dense_indexer_kl", one_q, one_kv, ("q_attn", "kv"))
        if one_q.shape[:2] != q.shape[:2] or one_kv.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"dense_indexer_kl: served layer {index}: q_attn {tuple(one_q.shape)} and kv {tuple(one_kv.shape)} "
                f"must have the batch, queries and keys of q {tuple(q.shape)} and k {tuple(k.shape)}"
            )
        if layers_lse is not None:
            _check_lse("dense_indexer_kl", layers_lse[index], one_q)
    start, key_start, key_mask = _visibility("dense_indexer_kl", q, k.shape[1], query_start, key_start, key_mask)
    scale = _index_scale("dense_indexer_kl", q, scale)
    layers_q, layers_kv = [x.detach() for x in layers_q], [x.detach() for x in layers_kv]
    if layers_lse is None:
        layers_lse = [
            attention_lse(
                one_q,
                one_kv,
                scale=attn_scale,
                query_start=start,
                key_start=key_start,
                key_mask=key_mask,
                allow_triton=allow_triton,
            )
            for one_q, one_kv in zip(layers_q, layers_kv)
        ]
    layers_lse = [x.detach() for x in layers_lse]
    arguments = (q, k, weights, layers_q, layers_kv, layers_lse, scale, attn_scale, start, key_start, key_mask)
    pairs = [((q, k), _MAX_INDEX_WIDTH), *((pair, _MAX_LATENT_WIDTH) for pair in zip(layers_q, layers_kv))]
    reason = next(filter(None, (_why_not_triton(*pair, width) for pair, width in pairs)), None)
    backends = _backends(reason, lambda *args: _dense_indexer_kl(*args)[0], dense_indexer_kl_reference)
    return _run("dense_indexer_kl", backends, allow_triton, arguments)


@torch.library.custom_op(f"{_NAMESPACE}::selected_index_scores", mutates_args=())
def _selected_index_scores(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, scale: float
) -> torch.Tensor:
    return selected_scores_triton(q, k, weights, indices, scale)


@register_fake(_selected_index_scores)
def _(q, k, weights, indices, scale):
    return q.new_empty(indices.shape, dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::indexer_kl", mutates_args=())
def _indexer_kl(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    target: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The KL `[B, S]` and what its gradient needs, `[2, B, S]`."""
    return indexer_kl_triton(q, k, weights, indices, target, scale)


@register_fake(_indexer_kl)
def _(q, k, weights, indices, target, scale):
    return q.new_empty(q.shape[:2], dtype=torch.float32), q.new_empty(2, *q.shape[:2], dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::index_backward", mutates_args=())
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
    arguments = (grad, q, k, weights, indices, target, stats, scale, deterministic)
    return dispatch("indexer_kl's gradient", _INDEX_BACKWARD, q.device, *arguments)


def _index_backward_in_pytorch(grad, q, k, weights, indices, target, stats, scale, deterministic):
    def run(*inputs):
        if target is None:
            return selected_index_scores_reference(*inputs, indices, scale)
        return indexer_kl_reference(*inputs, indices, target, scale)

    return _gradients_in_pytorch(run, grad, q, k, weights)


def _gradients_in_pytorch(function: Callable[..., torch.Tensor], grad: torch.Tensor, *inputs: torch.Tensor) -> tuple:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        result = function(*leaves)
        # What is minus infinity depends on nothing.
        grad = grad.to(result.dtype).masked_fill(result == float("-inf"), 0.0)
        gradients = torch.autograd.grad(result, leaves, grad)
    return tuple(x.contiguous() for x in gradients)


_INDEX_BACKWARD = (
    Backend("Triton", takes_all, index_backward_triton),
    Backend("PyTorch", takes_all, _index_backward_in_pytorch),
)


@register_fake(_index_backward)
def _(grad, q, k, weights, indices, target, stats, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, weights))


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


_selected_index_scores.register_autograd(_differentiate_scores, setup_context=_keep_for_scores)
_indexer_kl.register_autograd(_differentiate_kl, setup_context=_keep_for_kl)


@torch.library.custom_op(f"{_NAMESPACE}::selected_attention", mutates_args=())
def _selected_attention(
    q: torch.Tensor, kv: torch.Tensor, lse: torch.Tensor, indices: torch.Tensor, scale: float
) -> torch.Tensor:
    return selected_attention_triton(q, kv, lse, indices, scale)


@register_fake(_selected_attention)
def _(q, kv, lse, indices, scale):
    return q.new_empty(indices.shape, dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::attention_lse", mutates_args=())
def _attention_lse(
    q: torch.Tensor,
    kv: torch.Tensor,
    scale: float,
    query_start: torch.Tensor,
    key_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    return attention_lse_triton(q, kv, scale, Visibility(query_start, key_start, key_mask))


@register_fake(_attention_lse)
def _(q, kv, scale, query_start, key_start, key_mask):
    return q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::dense_indexer_kl", mutates_args=())
def _dense_indexer_kl(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    q_attn: list[torch.Tensor],
    kv: list[torch.Tensor],
    attn_lse: list[torch.Tensor],
    scale: float,
    attn_scale: float,
    query_start: torch.Tensor,
    key_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The KL `[B, S]` and the lse of the index scores `[B, S]`."""
    visible = Visibility(query_start, key_start, key_mask)
    return dense_kl_triton(q, k, weights, q_attn, kv, attn_lse, scale, attn_scale, visible)


@register_fake(_dense_indexer_kl)
def _(q, k, weights, q_attn, kv, attn_lse, scale, attn_scale, query_start, key_start, key_mask):
    return tuple(q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(2))


@torch.library.custom_op(f"{_NAMESPACE}::dense_indexer_kl_backward", mutates_args=())
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
    visible = Visibility(query_start, key_start, key_mask)
    arguments = (grad, q, k, weights, q_attn, kv, attn_lse, lse, scale, attn_scale, visible)
    return dispatch("dense_indexer_kl's gradient", _DENSE_BACKWARD, q.device, *arguments)


def _dense_backward_in_pytorch(grad, q, k, weights, q_attn, kv, attn_lse, lse, scale, attn_scale, visible):
    def run(*inputs):
        return dense_indexer_kl_reference(*inputs, q_attn, kv, attn_lse, scale, attn_scale, *visible)

    return _gradients_in_pytorch(run, grad, q, k, weights)


_DENSE_BACKWARD = (
    Backend("Triton", takes_all, dense_kl_backward_triton),
    Backend("PyTorch", takes_all, _dense_backward_in_pytorch),
)


@register_fake(_dense_indexer_kl_backward)
def _(grad, q, k, weights, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, weights))


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


_dense_indexer_kl.register_autograd(_differentiate_dense_kl, setup_context=_keep_for_dense_kl)


def _backends(reason: str | None, kernels: Callable[..., Any], reference: Callable[..., Any]) -> tuple[Backend, ...]:
    return Backend("Triton", lambda *_: reason, kernels), Backend("PyTorch", takes_all, reference)


def _run(operation: str, backends: tuple[Backend, ...], allow_triton: bool, arguments: tuple) -> torch.Tensor:
    """Run one of two backends; inside `torch.compile`, which keeps no record of failures, the first that takes."""
    q, (kernels, reference) = arguments[0], backends
    if not q.is_cuda or not allow_triton:
        return reference.run(*arguments)
    if torch.compiler.is_compiling():
        return (kernels if kernels.why_not(*arguments) is None else reference).run(*arguments)
    return dispatch(operation, backends, q.device, *arguments)


def _why_not_triton(
    q: torch.Tensor, keys: torch.Tensor, max_width: int, indices: torch.Tensor | None = None
) -> str | None:
    """Why the Triton kernels cannot take these arguments, or None."""
    _, _, heads, width = q.shape
    if triton is None:
        return "Triton is not installed (pip install triton)"
    if q.dtype not in (torch.bfloat16, torch.float16) or keys.dtype != q.dtype:
        return f"the kernels take bfloat16 or float16 queries and keys of one dtype, not {q.dtype} and {keys.dtype}"
    if heads > _MAX_HEADS or width > max_width:
        return f"{heads} heads or width {width} is above {_MAX_HEADS}, {max_width}"
    if indices is not None and indices.shape[-1] > _MAX_TOPK:
        return f"{indices.shape[-1]} selected keys are above {_MAX_TOPK}"
    if q.is_cuda and torch.version.hip is None and not has_capability(q.device, 80):
        return "the kernels need compute capability 8.0 or newer"
    return None


def _index_scale(operation: str, q: torch.Tensor, scale: float | None) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    check_scale(operation, scale, positive=True)
    return scale


def _as_list(value: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _check_indexer(operation: str, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> None:
    check_heads_and_keys(operation, q, k, ("q", "k"))
    check_tensors(operation, q=q, weights=weights)
    check_shape(operation, "weights", weights, "[B, S, H]", q.shape[:3])
    check_floats(operation, weights=weights)


def _check_lse(operation: str, lse: torch.Tensor, q: torch.Tensor) -> None:
    check_tensors(operation, q=q, lse=lse)
    check_shape(operation, "lse", lse, "[B, S, H]", q.shape[:3])
    check_floats(operation, lse=lse)


def _visibility(
    operation: str,
    q: torch.Tensor,
    num_keys: int,
    query_start: torch.Tensor | int | None,
    key_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    B, S = q.shape[:2]
    check_query_start(operation, query_start, B)
    check_tensors(operation, q=q, key_start=key_start, key_mask=key_mask)
    if not isinstance(query_start, torch.Tensor):
        first = num_keys - S if query_start is None else query_start
        query_start = torch.full((), first, dtype=torch.int64, device=q.device)
    if key_start is not None:
        check_shape(operation, "key_start", key_start, "[B, S]", (B, S), torch.int32)
    if key_mask is not None:
        check_shape(operation, "key_mask", key_mask, "[B, T]", (B, num_keys), torch.bool)
    return query_start.reshape(-1).expand(B), key_start, key_mask
