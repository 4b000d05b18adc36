"""What the public operations refuse at their face, in their own words: shapes, dtypes, devices, scales, slots.

Nothing here waits for a device: values are looked at where that is free, on the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensors(operation: str, **named: Any) -> None:
    """All that is not None are tensors on one device.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for tensors on different devices.
    """
    device, first = None, ""
    for name, value in named.items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{operation}: {name} must be a tensor, got {type(value).__name__}")
        if device is None:
            device, first = value.device, name
        elif value.device != device:
            raise ValueError(f"{operation}: {name} is on {value.device} and {first} on {device}: move them together")


def check_floats(operation: str, **named: torch.Tensor | None) -> None:
    """All that is not None are bf16, fp16, fp32 or fp64.

    Raises:
        ValueError: for another dtype.
    """
    for name, value in named.items():
        if value is not None and value.dtype not in FLOATS:
            raise ValueError(f"{operation}: {name} must be bf16, fp16, fp32 or fp64, got {value.dtype}")


def check_shape(
    operation: str,
    name: str,
    value: Any,
    letters: str,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> None:
    """`value` has exactly this shape, nothing that broadcasts to it, and this dtype if one is given.

    Args:
        operation: for the message, as below.
        name: of the argument.
        value: the argument.
        letters: the shape in the documentation's letters, `[B, S, H]`.
        shape: the same in numbers.
        dtype: of the elements, or None for any.

    Raises:
        ValueError: for another shape or dtype.
    """
    if tuple(value.shape) != tuple(shape) or (dtype is not None and value.dtype != dtype):
        wanted = "" if dtype is None else f"{_name_of(dtype)} "
        raise ValueError(
            f"{operation}: {name} must be {wanted}{letters} = {tuple(shape)}, got {_name_of(value.dtype)} of "
            f"{tuple(value.shape)}"
        )


def check_heads_and_keys(operation: str, q: Any, keys: Any, names: tuple[str, str]) -> None:
    """Queries `[B, S, H, D]` and keys `[B, T, D]`, floats on one device, with at least one head and one column.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for what does not fit.
    """
    query, key = names
    check_tensors(operation, **{query: q, key: keys})
    if q.dim() != 4 or keys.dim() != 3 or q.shape[0] != keys.shape[0] or q.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"{operation}: {query} [B, S, H, D] and {key} [B, T, D] do not fit: got {tuple(q.shape)} and "
            f"{tuple(keys.shape)}"
        )
    if q.shape[2] == 0 or q.shape[3] == 0:
        raise ValueError(f"{operation}: {query} [B, S, H, D] = {tuple(q.shape)} must have a head and a column")
    check_floats(operation, **{query: q, key: keys})


def check_integer(operation: str, name: str, value: Any, least: int, most: int | None = None) -> None:
    """`value` is an integer from `least` to `most`.

    Raises:
        TypeError: for another type.
        ValueError: for a number outside.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{operation}: {name} must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{operation}: {name} must be {bounds} (got {value})")


def check_scale(operation: str, scale: Any, positive: bool, name: str = "scale") -> None:
    """`scale` is a finite number, and above 0 where it is taken out of a ReLU.

    Raises:
        TypeError: for what is no number.
        ValueError: for NaN, infinity, or a scale that is not positive where it must be.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"{operation}: {name} must be a number, got {type(scale).__name__}")
    # Compiled with dynamic shapes it is a symbol.
    if not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"{operation}: {name} must be finite (got {scale})")
    if positive and not scale > 0:
        raise ValueError(f"{operation}: {name} must be positive, as it is taken out of the ReLU (got {scale})")


def check_indices(operation: str, indices: Any, q: torch.Tensor, slots: int) -> None:
    """`indices` are int32 `[B, S, K]` of q's B and S on its device; on a CPU each is -1 or one of `slots` slots.

    On a GPU their values are not looked at here: the kernels take a slot outside for -1.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for another shape, dtype or device.
        IndexError: for a slot outside, on a CPU.
    """
    check_tensors(operation, q=q, indices=indices)
    if indices.dim() != 3 or indices.shape[:2] != q.shape[:2] or indices.dtype != torch.int32:
        raise ValueError(
            f"{operation}: indices must be int32 [B, S, K] of B, S = {tuple(q.shape[:2])}, got {indices.dtype} of "
            f"{tuple(indices.shape)}"
        )
    _check_values(operation, "indices", indices, -1, slots, "slots")


def check_experts(operation: str, experts: torch.Tensor, count: int) -> None:
    """On a CPU, `experts` are numbers of `count` experts.

    Raises:
        IndexError: for another number.
    """
    _check_values(operation, "experts", experts, 0, count, "experts")


def check_query_start(operation: str, query_start: Any, batch: int) -> None:
    """An int that fits 32 bits, or an integer tensor of shape `[]` or `[B]`.

    Raises:
        TypeError: for another type.
        ValueError: for another shape or dtype, or a number that does not fit.
    """
    if query_start is None:
        return
    if not isinstance(query_start, torch.Tensor):
        check_integer(operation, "query_start", query_start, -(2**31), 2**31 - 1)
        return
    if query_start.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{operation}: query_start must be int32 or int64, got {query_start.dtype}")
    if query_start.dim() > 1 or query_start.numel() not in (1, batch):
        raise ValueError(
            f"{operation}: query_start must be of shape [] or [B] = [{batch}], got {tuple(query_start.shape)}"
        )


def check_angles(operation: str, x: torch.Tensor, cos: Any, sin: Any, rotated: int | None = None) -> None:
    """`cos` and `sin` are `[B or 1, S, R]` for `x [B, S, ..., D]`; R is even and `rotated`, or D if that is None.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for what does not fit.
    """
    check_tensors(operation, x=x, cos=cos, sin=sin)
    check_floats(operation, x=x, cos=cos, sin=sin)
    if x.dim() < 3:
        raise ValueError(f"{operation}: what is turned must be [B, S, ..., R], got {tuple(x.shape)}")
    rotated = x.shape[-1] if rotated is None else rotated
    wanted = ((1, x.shape[1], rotated), (x.shape[0], x.shape[1], rotated))
    for name, angle in (("cos", cos), ("sin", sin)):
        if tuple(angle.shape) not in wanted or rotated % 2:
            raise ValueError(
                f"{operation}: {name} must be [B or 1, S, R] = {wanted[1]}, R even, got {tuple(angle.shape)}"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"{operation}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} differ in shape")


def _check_values(operation: str, name: str, values: torch.Tensor, least: int, count: int, noun: str) -> None:
    if values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling() or _is_symbolic(values):
        return
    low, high = (int(x) for x in values.aminmax())
    if low < least or high >= count:
        wrong = low if low < least else high
        place = (values == wrong).nonzero()[0].tolist()
        allowed = f"0 .. {count - 1}" if count else "none"
        extra = ", or -1 for none" if least < 0 else ""
        raise IndexError(f"{operation}: {name}{place} is {wrong}, but there are {count} {noun}: give {allowed}{extra}")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_symbolic(values: torch.Tensor) -> bool:
    """Whether these are the shapes of a trace, which have no values."""
    return type(values) is not torch.Tensor and hasattr(values, "fake_mode")
