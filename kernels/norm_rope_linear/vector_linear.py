"""Linear layers of one or two tokens, as decoding has them: bound by reading the weights once.

Several layers of the same input run in one launch, the RMSNorm before them and the residual behind them included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..common.argument_checks import check_floats, check_shape, check_tensors
from ..common.dispatch import Backend, dispatch, takes_all
from ..common.kernel_launch import register_fake
from ..common.triton_support import runs_kernels
from .rms_norm import rms_norm
from .vector_linear_triton import MAX_NORMED, MAX_WEIGHTS, triton, vector_linear_triton

# A namespace of its own for every copy of this file: the installed one and each revision loaded from the Hub.
_NAMESPACE = __name__.replace(".", "_")
# With more tokens a matmul that reuses the weights is faster.
VECTOR_TOKENS = 2


def vector_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """The outputs of one or several linear layers without bias, side by side: `base + rms_norm(x) W^T`.

    Args:
        x: `[T, D]`.
        weights: up to `MAX_WEIGHTS` of `[N_i, D]`.
        norm: weight `[D]` of an RMSNorm that `x` has yet to pass, or None.
        eps: of that norm.
        base: `[T, N]` to add, or None.

    Returns:
        `[T, N]`, N the sum of N_i. No gradient flows.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    _check_linears("vector_linear", x, weights)
    check_tensors("vector_linear", x=x, norm=norm, base=base)
    check_floats("vector_linear", norm=norm, base=base)
    for name, value in {f"weights[{i}]": weight for i, weight in enumerate(weights)}.items():
        if value.dtype != x.dtype:
            raise ValueError(f"vector_linear: {name} must be {x.dtype}, as x, got {value.dtype}")
    if norm is not None:
        check_shape("vector_linear", "norm", norm, "[D]", x.shape[1:])
    if base is not None:
        outputs = sum(weight.shape[0] for weight in weights)
        check_shape("vector_linear", "base", base, "[T, N]", (x.shape[0], outputs))
    return _vector_linear(x, list(weights), norm, eps, base)


def takes_vector_linear(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether `vector_linear` runs these in Triton and is meant for them: `x [T, D]` of few tokens, no gradient."""
    return (
        triton is not None
        and x.is_cuda
        and 0 < x.shape[0] <= VECTOR_TOKENS
        and x.dtype in (torch.bfloat16, torch.float16)
        and not (torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights)))
        and all(w.dtype == x.dtype and w.is_cuda and w.stride(-1) == 1 for w in weights)
        and not torch.is_autocast_enabled("cuda")
    )


def wide_vector_linear(x: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 `scale * (x W^T)`, `[T, N]`, of half-precision `x [T, D]`.

    `weight [N, D]` is fp32, for fp32 arithmetic, or as `x`, whose precision products are then rounded to first.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    _check_linears("wide_vector_linear", x, [weight])
    if weight.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"wide_vector_linear: weight must be fp32 or {x.dtype}, as x, got {weight.dtype}")
    backends = _WIDE if runs_kernels(x) else _WIDE[-1:]
    return dispatch("wide_vector_linear", backends, x.device, x, weight, scale)


def takes_wide_vector_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `wide_vector_linear` runs these: few tokens on a GPU, no gradient, not inside `torch.compile`."""
    return (
        weight.dtype in (torch.float32, x.dtype)
        and weight.is_cuda
        and weight.stride(-1) == 1
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and weight.requires_grad)
        and takes_vector_linear(x)
    )


def _check_linears(operation: str, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    check_tensors(operation, x=x, **named)
    check_floats(operation, x=x, **named)
    if x.dim() != 2 or x.shape[1] == 0 or not named:
        raise ValueError(f"{operation}: x must be [T, D] with a column and one weight, got {tuple(x.shape)}")
    for name, weight in named.items():
        rows = weight.shape[0] if weight.dim() else 0
        check_shape(operation, name, weight, "[N, D] of x's D", (rows, x.shape[1]))


def vector_linear_reference(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and results as `vector_linear`, in PyTorch."""
    if norm is not None:
        x = rms_norm(x, norm, eps, allow_triton=False)
    out = torch.cat([F.linear(x, weight) for weight in weights], dim=-1)
    return out if base is None else base + out


@torch.library.custom_op(f"{_NAMESPACE}::vector_linear", mutates_args=())
def _vector_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    norm: torch.Tensor | None,
    eps: float,
    base: torch.Tensor | None,
) -> torch.Tensor:
    fits = x.is_cuda and triton is not None and len(weights) <= MAX_WEIGHTS
    backends = _BACKENDS if fits else _BACKENDS[-1:]
    return dispatch("vector_linear", backends, x.device, x, weights, norm, eps, base)


def _in_triton(x, weights, norm, eps, base) -> torch.Tensor:
    if norm is not None and x.shape[1] > MAX_NORMED:
        x, norm = rms_norm(x, norm, eps), None
    return vector_linear_triton(x, weights, norm, eps, base)


_BACKENDS = (Backend("Triton", takes_all, _in_triton), Backend("PyTorch", takes_all, vector_linear_reference))
_WIDE = (
    Backend("Triton", takes_all, lambda x, weight, scale: vector_linear_triton(x, [weight], scale=scale)),
    Backend("PyTorch", takes_all, lambda x, weight, scale: F.linear(x.to(weight.dtype), weight).float() * scale),
)


@register_fake(_vector_linear)
def _(x, weights, norm, eps, base):
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))
