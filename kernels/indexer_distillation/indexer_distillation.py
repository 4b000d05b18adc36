"""Distilling a lightning indexer from attention: index scores and attention of selected keys, and the KL between them.

Meaning: `indexer_distillation_reference.py`. Source: DeepSeek-V3.2 report, equations 1 to 4. Everything here is for
training: the index score is `I[t,s] = sum_h w[t,h] relu(scale q[t,h] . k[s])`, the indexer's distribution `softmax(I)`
over a query's keys, the teacher's the mean over heads of the attention probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from ..common.dispatch import Operation
from .indexer_distillation_ops import ATTENTION, DENSE_KL, KL, LSE, SCORES


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
    return _run(SCORES, allow_triton, q, k, weights, indices, scale)


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
    return _run(ATTENTION, allow_triton, q.detach(), kv.detach(), lse.detach(), indices, scale)


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
    scale = _index_scale("indexer_kl", q, scale)
    return _run(KL, allow_triton, q, k, weights, indices, target.detach(), scale)


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

    What `dense_indexer_kl` computes for itself when no `attn_lse` is given, and what makes of `selected_attention`
    the recall of the attention mass. Arguments as for `dense_indexer_kl`; no gradient flows.

    Returns:
        `[B, S, H]` in fp32 (fp64 for fp64 inputs), minus infinity for queries that see nothing.
    """
    check_heads_and_keys("attention_lse", q, kv, ("q", "kv"))
    check_scale("attention_lse", scale, positive=False)
    start, key_start, key_mask = _visibility("attention_lse", q, kv.shape[1], query_start, key_start, key_mask)
    return _run(LSE, allow_triton, q.detach(), kv.detach(), scale, start, key_start, key_mask)


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
            _run(LSE, allow_triton, *layer, attn_scale, start, key_start, key_mask)
            for layer in zip(layers_q, layers_kv)
        ]
    layers_lse = [x.detach() for x in layers_lse]
    arguments = (q, k, weights, layers_q, layers_kv, layers_lse, scale, attn_scale, start, key_start, key_mask)
    return _run(DENSE_KL, allow_triton, *arguments)


def _run(operation: Operation[torch.Tensor], allow_triton: bool, *arguments: Any) -> torch.Tensor:
    """Run an operation; inside `torch.compile`, which keeps no record of failures, the first backend that takes."""
    device, (kernels, reference) = arguments[0].device, operation.backends
    if torch.compiler.is_compiling() and allow_triton and device.type == "cuda":
        return (kernels if kernels.why_not(*arguments) is None else reference).run(*arguments)
    return operation(device, *arguments, allow_triton=allow_triton)


def _index_scale(operation: str, q: torch.Tensor, scale: float | None) -> float:
    if scale is None:
        default: float = q.shape[-1] ** -0.5
        return default
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
