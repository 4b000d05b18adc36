"""Absorbed queries and expanded values of Multi-head Latent Attention for one or two tokens, as decoding has them.

Source: the absorbed form (DeepSeek-V2, section 2.1); each kernel reads a head's weight once and fills the GPU, where
a batched matmul of one row a head does neither.
"""

from __future__ import annotations

import torch

from ..common.argument_checks import check_angles, check_floats, check_shape, check_tensors
from ..common.dispatch import Backend, dispatch, takes_all
from ..common.kernel_launch import register_fake
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

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    _check_heads("absorb_queries", "q", q, "to_latent", to_latent)
    heads, nope = to_latent.shape[:2]
    if heads != q.shape[2] or nope > q.shape[3]:
        raise ValueError(
            f"absorb_queries: q [B, S, H, N + R] and to_latent [H, N, C] do not fit: got {tuple(q.shape)} and "
            f"{tuple(to_latent.shape)}"
        )
    check_angles("absorb_queries", q, cos, sin, q.shape[3] - nope)
    return _absorb_queries(q, to_latent, cos, sin, interleaved)


def expand_values(latent_out: torch.Tensor, to_value: torch.Tensor) -> torch.Tensor:
    """`latent_out W_UV` of `latent_out [B, S, H, C]` and `W_UV [H, V, C]`: `[B, S, H, V]`. No gradient flows.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    _check_heads("expand_values", "latent_out", latent_out, "to_value", to_value)
    values = (latent_out.shape[2], to_value.shape[1], latent_out.shape[3])
    check_shape("expand_values", "to_value", to_value, "[H, V, C] of latent_out [B, S, H, C]", values)
    return _expand_values(latent_out, to_value)


def _check_heads(operation: str, name: str, x: torch.Tensor, weight_name: str, weight: torch.Tensor) -> None:
    check_tensors(operation, **{name: x, weight_name: weight})
    check_floats(operation, **{name: x, weight_name: weight})
    if x.dim() != 4 or weight.dim() != 3 or weight.dtype != x.dtype:
        raise ValueError(
            f"{operation}: {name} must be [B, S, H, ...] and {weight_name} [H, ..., ...] of its dtype, got "
            f"{x.dtype} of {tuple(x.shape)} and {weight.dtype} of {tuple(weight.shape)}"
        )


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
    backends = _ABSORB if q.is_cuda and triton is not None else _ABSORB[-1:]
    return dispatch("absorb_queries", backends, q.device, q, to_latent, cos, sin, interleaved)


_ABSORB = (
    Backend("Triton", takes_all, absorb_queries_triton),
    Backend("PyTorch", takes_all, absorb_queries_reference),
)


@register_fake(_absorb_queries)
def _(q, to_latent, cos, sin, interleaved):
    return q.new_empty(*q.shape[:3], to_latent.shape[2] + q.shape[-1] - to_latent.shape[1])


@torch.library.custom_op(f"{_NAMESPACE}::expand_values", mutates_args=())
def _expand_values(latent_out: torch.Tensor, to_value: torch.Tensor) -> torch.Tensor:
    backends = _EXPAND if latent_out.is_cuda and triton is not None else _EXPAND[-1:]
    return dispatch("expand_values", backends, latent_out.device, latent_out, to_value)


def _expand_in_pytorch(latent_out: torch.Tensor, to_value: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bshc,hvc->bshv", latent_out, to_value).contiguous()


_EXPAND = (
    Backend("Triton", takes_all, expand_values_triton),
    Backend("PyTorch", takes_all, _expand_in_pytorch),
)


@register_fake(_expand_values)
def _(latent_out, to_value):
    return latent_out.new_empty(*latent_out.shape[:3], to_value.shape[1])
