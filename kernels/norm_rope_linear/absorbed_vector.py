"""Absorbed queries and expanded values of Multi-head Latent Attention for one or two tokens, as decoding has them.

Source: the absorbed form (DeepSeek-V2, section 2.1); each kernel reads a head's weight once and fills the GPU, where
a batched matmul of one row per head does neither.
"""

from __future__ import annotations

import torch

from ..common.argument_checks import check_angles, check_floats, check_shape, check_tensors
from ..common.custom_op import custom_op
from ..common.dispatch import Backend, Operation, takes_all
from ..common.triton_support import HALF_PRECISION, has_kernels, needs_gradient
from .absorbed_vector_triton import absorb_queries_triton, expand_values_triton
from .rotary import rotate

# With more tokens a batched matmul that reuses the weights is faster.
VECTOR_TOKENS = 2


def takes_absorbed_vector(q: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether the two functions below run these in Triton and are meant for them: few tokens, no gradient."""
    return (
        has_kernels(q.device)
        and 0 < q.shape[:2].numel() <= VECTOR_TOKENS
        and q.dtype in HALF_PRECISION
        and all(w.dtype == q.dtype and w.device == q.device and w.stride(-1) == 1 for w in weights)
        and not needs_gradient(q, *weights)
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


@custom_op(lambda q, to_latent, cos, *_: q.new_empty(*q.shape[:3], to_latent.shape[2] + cos.shape[-1]))
def _absorb_queries(
    q: torch.Tensor, to_latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    return _ABSORB(q.device, q, to_latent, cos, sin, interleaved)


_ABSORB = Operation(
    "absorb_queries",
    Backend("Triton", takes_all, absorb_queries_triton),
    Backend("PyTorch", takes_all, absorb_queries_reference),
    token=lambda new: (new(1, 1, 20, 256), new(20, 192, 512), new(1, 1, 64), new(1, 1, 64), True),
)


@custom_op(lambda latent_out, to_value: latent_out.new_empty(*latent_out.shape[:3], to_value.shape[1]))
def _expand_values(latent_out: torch.Tensor, to_value: torch.Tensor) -> torch.Tensor:
    return _EXPAND(latent_out.device, latent_out, to_value)


def _expand_in_pytorch(latent_out: torch.Tensor, to_value: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bshc,hvc->bshv", latent_out, to_value).contiguous()


_EXPAND = Operation(
    "expand_values",
    Backend("Triton", takes_all, expand_values_triton),
    Backend("PyTorch", takes_all, _expand_in_pytorch),
    token=lambda new: (new(1, 1, 20, 512), new(20, 256, 512)),
)
