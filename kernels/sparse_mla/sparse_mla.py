"""Sparse MLA: each query attends, in the latent space, to the keys that the lightning indexer selected for it.

Meaning: `sparse_mla_reference.py`. Source: the absorbed form of Multi-head Latent Attention (DeepSeek-V2, section 2.1)
restricted to the selected keys (DeepSeek-V3.2 report, equation 2). The backward pass keeps inputs, output and lse, and
computes the probabilities again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..common.argument_checks import check_heads_and_keys, check_indices, check_integer, check_scale, check_tensors
from ..common.custom_op import custom_op
from ..common.device_target import why_too_old
from ..common.dispatch import Backend, Operation, takes_all
from ..common.triton_support import HALF_PRECISION, has_kernels
from .merged_selection import MergedSelection, merges_ahead
from .sparse_mla_backward_triton import sparse_mla_backward_triton
from .sparse_mla_reference import sparse_mla_reference, sparse_mla_reference_backward
from .sparse_mla_triton import queries_per_wave, selection_group, sparse_mla_merged, sparse_mla_triton

# What models use, the launches' arithmetic included.
__all__ = [
    "MergedSelection",
    "merging_group",
    "queries_per_wave",
    "selection_group",
    "sparse_mla",
    "takes_sparse_mla",
]
# Heads, selected keys and latent width that the Triton kernels are tested for.
_MAX_HEADS, _MAX_TOPK, _MAX_WIDTH, _MAX_VALUES = 128, 8192, 576, 512


def sparse_mla(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor | MergedSelection,
    *,
    scale: float,
    value_dim: int,
    allow_triton: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax(scale * q . kv[indices]) @ kv[indices, :value_dim]` for every query and head.

    Args:
        q: absorbed queries of shape `[B, S, H, D]`: `[q_nope W_UK | rope(q_rope)]`; bf16, fp16, fp32 or fp64.
        kv: latents of shape `[B, T, D]`: `[c | rope(k_rope)]`, one row per token, shared by all heads.
        indices: int32 of shape `[B, S, K]`: slots in `kv`, -1 where a query has fewer keys (anywhere in the row).
            Causality and padding are the caller's business: whatever is listed is read. A slot that `kv` does not
            have is refused on a CPU and taken for -1 on a GPU, where looking would wait for the device. Or a
            `MergedSelection` of S queries, without gradient and for the Triton kernels alone.
        scale: factor on the dot products, any finite number.
        value_dim: leading entries of a latent that are its value.
        allow_triton: use the Triton kernels on CUDA where they take these arguments; False is PyTorch anywhere.

    Returns:
        `out` of shape `[B, S, H, value_dim]` in `q`'s dtype, zero for queries without keys, and `lse` of shape
        `[B, S, H]` in fp32 (natural logarithm; minus infinity for queries without keys). Both are differentiable in
        `q` and `kv`.

    On CUDA, bf16 and fp16 run in Triton, everything else in PyTorch. The gradient of `kv` is summed in fp32 by
    atomics, in an order that changes from run to run; under `torch.use_deterministic_algorithms(True)` in a fixed
    order, which is slower and takes up to 1 GiB of scratch memory.

    Raises:
        TypeError: a tensor, number or integer that is none.
        ValueError: shapes, dtypes or devices that do not fit each other.
        IndexError: a slot that `kv` does not have, on a CPU.
    """
    check_heads_and_keys("sparse_mla", q, kv, ("q", "kv"))
    check_scale("sparse_mla", scale, positive=False)
    check_integer("sparse_mla", "value_dim", value_dim, 1, kv.shape[-1])
    if isinstance(indices, MergedSelection):
        return _attend_by_merged(q, kv, indices, scale, value_dim)
    check_indices("sparse_mla", indices, q, kv.shape[1])
    arguments = (q, kv, indices, scale, value_dim)
    # PyTorch's blocks of queries, unrolled in a compiled graph, would be one for every length.
    if torch.compiler.is_compiling() or (allow_triton and _ATTEND.chooses_kernels(q.device, *arguments)):
        return _sparse_mla(*arguments, allow_triton)
    return sparse_mla_reference(*arguments)


def merging_group(
    like: torch.Tensor, heads: int, width: int, value_dim: int, queries: int, topk: int, slots: int
) -> int:
    """How many adjacent queries' selections `sparse_mla` would rather be given merged, see `MergedSelection`; 1: none.

    Args:
        like: any tensor of the queries' and latents' dtype and device.
        heads: attention heads.
        width: D of `sparse_mla`.
        value_dim: of `sparse_mla`.
        queries: S.
        topk: K.
        slots: T.
    """
    if not takes_sparse_mla(like.new_empty(1, 0, width), heads, value_dim, topk):
        return 1
    return merges_ahead(like.device, heads, queries, topk, slots)


def takes_sparse_mla(kv: torch.Tensor, heads: int, value_dim: int, topk: int) -> bool:
    """Whether the Triton kernels, not PyTorch, would attend to lists of `topk` of the latents `kv [B, T, D]`."""
    if not has_kernels(kv.device):
        return False
    q = kv.new_empty(1, 0, heads, kv.shape[-1])
    return _why_not_triton(q, kv, q.new_empty(1, 0, topk, dtype=torch.int32), 1.0, value_dim) is None


def _attend_by_merged(
    q: torch.Tensor, kv: torch.Tensor, selection: MergedSelection, scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensors("sparse_mla", q=q, keys=selection.keys, counts=selection.counts)
    if not has_kernels(q.device):
        raise ValueError(
            f"merged selections are for the Triton kernels, and q is on {q.device}: give indices [B, S, K]"
        )
    if selection.queries != q.shape[1] or selection.keys.shape[0] != q.shape[0]:
        raise ValueError(
            f"sparse_mla: the selection is of {selection.keys.shape[0]} x {selection.queries} queries, q is "
            f"{tuple(q.shape)}"
        )
    if torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad):
        raise ValueError("sparse_mla: merged selections have no gradient: give indices [B, S, K]")
    keys, counts, group, _ = selection
    return sparse_mla_merged(q, kv, keys, counts, group, scale, value_dim)


def _why_not_triton(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int
) -> str | None:
    _, _, heads, width = q.shape
    if q.dtype not in HALF_PRECISION or kv.dtype != q.dtype:
        return f"the kernels take bfloat16 or float16 for both q and kv, not {q.dtype} and {kv.dtype}"
    if heads > _MAX_HEADS or indices.shape[-1] > _MAX_TOPK or width > _MAX_WIDTH or value_dim > _MAX_VALUES:
        return (
            f"{heads} heads, {indices.shape[-1]} selected keys, width {width} or value_dim {value_dim} is above "
            f"{_MAX_HEADS}, {_MAX_TOPK}, {_MAX_WIDTH}, {_MAX_VALUES}"
        )
    return why_too_old(q.device)


def _in_pytorch(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = sparse_mla_reference(*arguments)
    return out.contiguous(), lse.contiguous()


def _example(new: Callable[..., torch.Tensor], queries: int) -> tuple[Any, ...]:
    return new(1, queries, 20, 576), new(1, 8192, 576), new(1, queries, 2048, dtype=torch.int32), 1.0, 512


_ATTEND = Operation(
    "sparse_mla",
    Backend("Triton", _why_not_triton, sparse_mla_triton),
    Backend("PyTorch", takes_all, _in_pytorch),
    prefill=lambda new: _example(new, 8192),
    token=lambda new: _example(new, 1),
)


def _backward_in_pytorch(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *inputs, _ = arguments  # it is deterministic
    return sparse_mla_reference_backward(*inputs)


def _why_not_backward(*arguments: Any) -> str | None:
    _, _, q, kv, indices, out, _, scale, _ = arguments
    return _why_not_triton(q, kv, indices, scale, out.shape[-1])


def _backward_example(new: Callable[..., torch.Tensor]) -> tuple[Any, ...]:
    out, lse = new(1, 8192, 20, 512), new(1, 8192, 20, dtype=torch.float32)
    return out, lse, *_example(new, 8192)[:3], out, lse, 1.0, False


_GRADIENT = Operation(
    "sparse_mla's gradient",
    Backend("Triton", _why_not_backward, sparse_mla_backward_triton),
    Backend("PyTorch", takes_all, _backward_in_pytorch),
    prefill=_backward_example,
)


@custom_op(lambda grad_out, grad_lse, q, kv, *_: tuple(x.new_empty(x.shape) for x in (q, kv)))
def _sparse_mla_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    allow_triton: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = (grad_out, grad_lse, q, kv, indices, out, lse, scale, deterministic)
    return _GRADIENT(q.device, *arguments, allow_triton=allow_triton)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, kv, indices, ctx.scale, _, ctx.allow_triton = inputs
    ctx.save_for_backward(q, kv, indices, *output)


def _differentiate(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, kv, indices, out, lse = ctx.saved_tensors
    gradients = _sparse_mla_backward(grad_out, grad_lse, q, kv, indices, out, lse, ctx.scale, ctx.allow_triton)
    return *gradients, None, None, None, None


def _shapes(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], value_dim), q.new_empty(q.shape[:3], dtype=lse_dtype)


@custom_op(_shapes, _differentiate, _keep_for_backward)
def _sparse_mla(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    value_dim: int,
    allow_triton: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _ATTEND(q.device, q, kv, indices, scale, value_dim, allow_triton=allow_triton)
