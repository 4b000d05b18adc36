"""The lightning indexer of DeepSeek Sparse Attention: score every visible key, keep the best `topk` of each query.

Meaning: `lightning_indexer_reference.py`. Source: DeepSeek-V3.2 inference code and report.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..common.argument_checks import (
    FLOATS,
    check_floats,
    check_heads_and_keys,
    check_integer,
    check_query_start,
    check_scale,
    check_shape,
    check_tensors,
)
from ..common.custom_op import custom_op
from ..common.dispatch import Backend, Operation, takes_all
from .indexer_quantization import quantize_for_scoring, quantized_rows
from .lightning_indexer_reference import lightning_indexer_reference, visible_keys
from .lightning_indexer_triton import lightning_indexer_triton, unsupported_reason

__all__ = ["lightning_indexer", "visible_keys"]


def lightning_indexer(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    topk: int,
    *,
    scale: float | None = None,
    query_start: torch.Tensor | int | None = None,
    key_start: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    fp8: bool = False,
    quantized_keys: bool = False,
    allow_triton: bool = True,
) -> torch.Tensor:
    """Select for each query the `topk` visible keys of largest `sum_h weights[h] * relu(scale * q[h] . k)`.

    A key is visible to query i of batch b when its slot lies in `key_start[b, i] .. query_start[b] + i` and `key_mask`
    allows it.

    Args:
        q: indexer queries of shape `[B, S, H, D]`, RoPE applied; bf16, fp16, fp32 or fp64.
        k: indexer keys of shape `[B, T, D]`: the whole cache, unfilled slots included.
        weights: head weights of shape `[B, S, H]` (`weights_proj(x) * H**-0.5`), any float dtype.
        topk: number of keys to select.
        scale: factor on the dot products, positive. Default: `D**-0.5`.
        query_start: cache slot of the first query, an int or an integer tensor of shape `[]` or `[B]` (read on its
            device, never synchronised). Default: `T - S`.
        key_start: int32 of shape `[B, S]`, the first slot that a query may see (where its document begins in a packed
            sequence). Default: 0.
        key_mask: bool of shape `[B, T]`, False for padding. `[B, S, T]` (a mask for each query) is accepted by the
            PyTorch path.
        fp8: score e4m3 queries and keys (`indexer_quantization.py`). The selection differs a little from that by
            unquantised scores, not from backend to backend.
        quantized_keys: with `fp8`, `k` holds rows of `quantized_rows` already: a cache quantises each key once.
        allow_triton: use the Triton kernels on CUDA where they take these arguments; False is PyTorch anywhere.

    Returns:
        int32 of shape `[B, S, min(topk, T)]`: key slots in ascending order, -1 at the end of rows that see fewer
        keys. Ties go to the smaller slot. A key whose score is NaN or minus infinity is never selected, as if it were
        not visible; a NaN that no visible key of a query meets changes nothing for it. No gradient flows.

    Raises:
        TypeError: a tensor, number or integer that is none.
        ValueError: shapes, dtypes or devices that do not fit each other, a scale that is not positive.
    """
    _check_arguments(q, k, weights, topk, scale, query_start, key_mask, key_start)
    if not isinstance(query_start, torch.Tensor):
        first = k.shape[1] - q.shape[1] if query_start is None else query_start
        query_start = torch.full((), first, dtype=torch.int64, device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, weights = q.detach(), k.detach(), weights.detach()
    if fp8 and not quantized_keys:
        k = quantized_rows(k, allow_triton)
    return _lightning_indexer(q, k, weights, topk, scale, query_start, key_start, key_mask, fp8, allow_triton)


@custom_op(lambda q, k, weights, topk, *_: q.new_empty(*q.shape[:2], min(topk, k.shape[1]), dtype=torch.int32))
def _lightning_indexer(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    topk: int,
    scale: float,
    query_start: torch.Tensor,
    key_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    fp8: bool,
    allow_triton: bool,
) -> torch.Tensor:
    if fp8:
        q, q_scale = quantize_for_scoring(q, allow_triton)
        weights = weights.float() * q_scale
    arguments = (q, k, weights, topk, scale, query_start, key_mask, key_start)
    return _INDEXER(q.device, *arguments, allow_triton=allow_triton)


def _why_not_triton(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> str | None:
    _, topk, _, _, key_mask, _ = rest
    return unsupported_reason(q, k, topk, key_mask)


def _in_pytorch(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
    return lightning_indexer_reference(q if q.dtype in FLOATS else q.to(k.dtype), k, *rest)


def _example(new: Callable[..., torch.Tensor], queries: int, keys: int) -> tuple[Any, ...]:
    start = new(1, dtype=torch.int64)
    return new(1, queries, 32, 128), new(1, keys, 128), new(1, queries, 32), 2048, 1.0, start, None, None


_INDEXER = Operation(
    "lightning_indexer",
    Backend("Triton", _why_not_triton, lightning_indexer_triton),
    Backend("PyTorch", takes_all, _in_pytorch),
    prefill=lambda new: _example(new, 8192, 8192),
    token=lambda new: _example(new, 1, 8192),
)


def _check_arguments(
    q: Any, k: Any, weights: Any, topk: Any, scale: Any, query_start: Any, key_mask: Any, key_start: Any
) -> None:
    name = "lightning_indexer"
    check_heads_and_keys(name, q, k, ("q", "k"))
    check_tensors(name, q=q, weights=weights, key_mask=key_mask, key_start=key_start)
    check_shape(name, "weights", weights, "[B, S, H]", q.shape[:3])
    check_floats(name, weights=weights)
    check_integer(name, "topk", topk, 1)
    if scale is not None:
        check_scale(name, scale, positive=True)
    check_query_start(name, query_start, q.shape[0])
    if key_mask is not None:
        shape = (q.shape[0], q.shape[1], k.shape[1])
        if key_mask.dim() != 3:
            check_shape(name, "key_mask", key_mask, "[B, T] (or [B, S, T])", (shape[0], shape[2]), torch.bool)
        else:
            check_shape(name, "key_mask", key_mask, "[B, S, T] (or [B, T])", shape, torch.bool)
    if key_start is not None:
        check_shape(name, "key_start", key_start, "[B, S]", q.shape[:2], torch.int32)
