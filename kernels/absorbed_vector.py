"""Absorbed queries and expanded values of Multi-head Latent Attention for one or two tokens, as decoding has them.

Source: the absorbed form (DeepSeek-V2, section 2.1); each kernel reads a head's weight once and fills the GPU, where
a batched matmul of one row a head does neither.
"""

from __future__ import annotations

import torch

from .absorbed_vector_triton import absorb_queries_triton, expand_values_triton, triton
from .rotary import rotate

# A namespace of its own for every copy of this file: the installed one and each revision loaded from the Hub.
_NAMESPACE = __name__.replace(".", "_")
# With more tokens a batched matmul that reuses the weights is faster.
VECTOR_TOKENS = 2


def takes_absorbed_vector(q: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether the two functions below run these in Triton and are meant for them: few tokens, no gradient."""
    return (
        triton is not None
        and q.is_cuda
        and 0 < q.shape[:2].numel() <= VECTOR_TOKENS
        and q.dtype in (torch.bfloat16, torch.float16)
        and all(w.dtype == q.dtype and w.is_cuda and w.stride(-1) == 1 for w in weights)
        and not (torch.is_grad_enabled() and (q.requires_grad or any(w.requires_grad for w in weights)))
        and not torch.is_autocast_enabled("cuda")
    )


def absorb_queries(
    q: torch.Tensor, to_latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """`[q_nope W_UK | rotate(q_rope)]`.

    Args:
        q: `[B, S, H, N + R]`, queries as projected.
        to_latent: `W_UK [H, N, C]`.
        cos: `[B or 1, S, R]`.
        sin: likewise.
        interleaved: as `rotary.rotate`.

    Returns:
        `[B, S, H, C + R]`. No gradient flows.
    """
    return _absorb_queries(q, to_latent, cos, sin, interleaved)


def expand_values(latent_out: torch.Tensor, to_value: torch.Tensor) -> torch.Tensor:
    """`latent_out W_UV` of `latent_out [B, S, H, C]` and `W_UV [H, V, C]`: `[B, S, H, V]`. No gradient flows."""
    return _expand_values(latent_out, to_value)


def absorb_queries_reference(
    q: torch.Tensor, to_latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Arguments and results as `absorb_queries`, in PyTorch."""
    q_nope, q_rope = q.split([to_latent.shape[1], q.shape[-1] - to_latent.shape[1]], dim=-1)
    q_latent = torch.einsum("bshn,hnc->bshc", q_nope, to_latent)
    return torch.cat((q_latent, rotate(q_rope, cos, sin, interleaved)), dim=-1)


@torch.library.custom_op(f"{_NAMESPACE}::absorb_queries", mutates_args=())
def _absorb_queries(
    q: torch.Tensor, to_latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    if q.is_cuda and triton is not None:
        return absorb_queries_triton(q, to_latent, cos, sin, interleaved)
    return absorb_queries_reference(q, to_latent, cos, sin, interleaved)


@_absorb_queries.register_fake
def _(q, to_latent, cos, sin, interleaved):
    return q.new_empty(*q.shape[:3], to_latent.shape[2] + q.shape[-1] - to_latent.shape[1])


@torch.library.custom_op(f"{_NAMESPACE}::expand_values", mutates_args=())
def _expand_values(latent_out: torch.Tensor, to_value: torch.Tensor) -> torch.Tensor:
    if latent_out.is_cuda and triton is not None:
        return expand_values_triton(latent_out, to_value)
    return torch.einsum("bshc,hvc->bshv", latent_out, to_value).contiguous()


@_expand_values.register_fake
def _(latent_out, to_value):
    return latent_out.new_empty(*latent_out.shape[:3], to_value.shape[1])
