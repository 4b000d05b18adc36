"""Linear layers of one or two tokens, as decoding has them: bound by reading the weights once.

Several layers of the same input run in one launch, the RMSNorm before them and the residual behind them included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..common.argument_checks import check_floats, check_shape, check_tensors
from ..common.custom_op import custom_op
from ..common.dispatch import Backend, Operation, takes_all
from ..common.triton_support import HALF_PRECISION, has_kernels, needs_gradient
from .rms_norm import rms_norm
from .vector_linear_triton import MAX_NORMED, MAX_WEIGHTS, vector_linear_triton

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
        has_kernels(x.device)
        and 0 < x.shape[0] <= VECTOR_TOKENS
        and x.dtype in HALF_PRECISION
        and not needs_gradient(x, *weights)
        and all(w.dtype == x.dtype and w.device == x.device and w.stride(-1) == 1 for w in weights)
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
    return _WIDE(x.device, x, weight, scale)


def takes_wide_vector_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `wide_vector_linear` runs these: few tokens on a GPU, no gradient, not inside `torch.compile`."""
    return (
        weight.dtype in (torch.float32, x.dtype)
        and weight.device == x.device
        and weight.stride(-1) == 1
        and not torch.compiler.is_compiling()
        and not needs_gradient(weight)
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


@custom_op(lambda x, weights, *_: x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights)))
def _vector_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    norm: torch.Tensor | None,
    eps: float,
    base: torch.Tensor | None,
) -> torch.Tensor:
    return _LINEARS(x.device, x, weights, norm, eps, base)


def _why_not_triton(x: torch.Tensor, weights: list[torch.Tensor], *_: Any) -> str | None:
    return f"it takes at most {MAX_WEIGHTS} weights" if len(weights) > MAX_WEIGHTS else None


def _in_triton(
    x: torch.Tensor, weights: list[torch.Tensor], norm: torch.Tensor | None, eps: float, base: torch.Tensor | None
) -> torch.Tensor:
    if norm is not None and x.shape[1] > MAX_NORMED:
        x, norm = rms_norm(x, norm, eps), None
    return vector_linear_triton(x, weights, norm, eps, base)


_LINEARS = Operation(
    "vector_linear",
    Backend("Triton", _why_not_triton, _in_triton),
    Backend("PyTorch", takes_all, vector_linear_reference),
    token=lambda new: (new(1, 2048), [new(768, 2048), new(576, 2048)], new(2048), 1e-6, None),
)
_WIDE: Operation[torch.Tensor] = Operation(
    "wide_vector_linear",
    Backend("Triton", takes_all, lambda x, weight, scale: vector_linear_triton(x, [weight], scale=scale)),
    Backend("PyTorch", takes_all, lambda x, weight, scale: F.linear(x.to(weight.dtype), weight).float() * scale),
    token=lambda new: (new(1, 2048), new(32, 2048), 1.0),
)
