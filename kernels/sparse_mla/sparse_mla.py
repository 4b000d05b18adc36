"""Sparse MLA: each query attends, in the latent space, to the keys that the lightning indexer selected for it.

Meaning: `sparse_mla_reference.py`. Source: the absorbed form of Multi-head Latent Attention (DeepSeek-V2, section 2.1)
restricted to the selected keys (DeepSeek-V3.2 report, equation 2). The backward pass keeps inputs, output and lse, and
computes the probabilities again.
"""

from __future__ import annotations

import torch

from ..common.argument_checks import check_heads_and_keys, check_indices, check_integer, check_scale, check_tensors
from ..common.device_target import has_capability
from ..common.dispatch import Backend, dispatch, say_fallback, takes_all
from ..common.kernel_launch import register_fake
from ..common.triton_support import runs_kernels
from .merged_selection import MergedSelection, merges_ahead
from .sparse_mla_backward_triton import sparse_mla_backward_triton
from .sparse_mla_reference import sparse_mla_reference, sparse_mla_reference_backward
from .sparse_mla_triton import sparse_mla_merged, sparse_mla_triton, triton

# A namespace of its own for every copy of this file: the installed one and each revision loaded from the Hub.
_NAMESPACE = __name__.replace(".", "_")
# Heads, selected keys and latent width that the Triton kernels are tested for.
_MAX_HEADS, _MAX_TOPK, _MAX_WIDTH = 128, 8192, 576


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
        kv: latents of shape `[B, T, D]`: `[c | rope(k_rope)]`, one row a token, shared by all heads.
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
    if q.is_cuda and allow_triton:
        reason = _unsupported(q, kv, indices, value_dim)
        if reason is None:
            return _sparse_mla(q, kv, indices, scale, value_dim)
        if not torch.compiler.is_compiling():
            say_fallback("sparse_mla", "Triton", reason, q.device)
    if torch.compiler.is_compiling():
        # Its blocks of queries, unrolled, would be a graph for every length.
        return _sparse_mla(q, kv, indices, scale, value_dim, False)
    return sparse_mla_reference(q, kv, indices, scale, value_dim)


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
    if not kv.is_cuda:
        return False
    q = kv.new_empty(1, 0, heads, kv.shape[-1])
    return _unsupported(q, kv, q.new_empty(1, 0, topk, dtype=torch.int32), value_dim) is None


def _attend_by_merged(
    q: torch.Tensor, kv: torch.Tensor, selection: MergedSelection, scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensors("sparse_mla", q=q, keys=selection.keys, counts=selection.counts)
    if not runs_kernels(q):
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


@torch.library.custom_op(f"{_NAMESPACE}::sparse_mla", mutates_args=())
def _sparse_mla(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    value_dim: int,
    allow_triton: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    backends = _FORWARD if q.is_cuda and allow_triton else _FORWARD[-1:]
    return dispatch("sparse_mla", backends, q.device, q, kv, indices, scale, value_dim)


def _forward_in_pytorch(q, kv, indices, scale, value_dim) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = sparse_mla_reference(q, kv, indices, scale, value_dim)
    return out.contiguous(), lse.contiguous()


_FORWARD = (Backend("Triton", takes_all, sparse_mla_triton), Backend("PyTorch", takes_all, _forward_in_pytorch))


@register_fake(_sparse_mla)
def _(q, kv, indices, scale, value_dim, allow_triton=True):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], value_dim), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.custom_op(f"{_NAMESPACE}::sparse_mla_backward", mutates_args=())
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
    backends = _BACKWARD if allow_triton else _BACKWARD[-1:]
    return dispatch("sparse_mla's gradient", backends, q.device, *arguments)


def _backward_in_pytorch(grad_out, grad_lse, q, kv, indices, out, lse, scale, deterministic):
    return sparse_mla_reference_backward(grad_out, grad_lse, q, kv, indices, out, lse, scale)


_BACKWARD = (
    Backend("Triton", takes_all, sparse_mla_backward_triton),
    Backend("PyTorch", takes_all, _backward_in_pytorch),
)


@register_fake(_sparse_mla_backward)
def _(grad_out, grad_lse, q, kv, indices, out, lse, scale, allow_triton=True):
    return torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(
        kv, memory_format=torch.contiguous_format
    )


def _keep_for_backward(ctx, inputs, output):
    q, kv, indices, ctx.scale, _, ctx.allow_triton = inputs
    ctx.save_for_backward(q, kv, indices, *output)


def _differentiate(ctx, grad_out, grad_lse):
    q, kv, indices, out, lse = ctx.saved_tensors
    gradients = _sparse_mla_backward(grad_out, grad_lse, q, kv, indices, out, lse, ctx.scale, ctx.allow_triton)
    return *gradients, None, None, None, None


_sparse_mla.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _unsupported(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, value_dim: int) -> str | None:
    """Why the Triton kernels cannot take these arguments, or None."""
    _, _, heads, width = q.shape
    if triton is None:
        return "Triton is not installed (pip install triton)"
    if q.dtype not in (torch.bfloat16, torch.float16) or kv.dtype != q.dtype:
        return f"the kernels take bfloat16 or float16 for both q and kv, not {q.dtype} and {kv.dtype}"
    if heads > _MAX_HEADS or indices.shape[-1] > _MAX_TOPK or width > _MAX_WIDTH or value_dim > 512:
        return (
            f"{heads} heads, {indices.shape[-1]} selected keys, width {width} or value_dim {value_dim} is above "
            f"{_MAX_HEADS}, {_MAX_TOPK}, {_MAX_WIDTH}, 512"
        )
    if torch.version.hip is None and not has_capability(q.device, 80):
        return "the kernels need compute capability 8.0 or newer"
    return None
