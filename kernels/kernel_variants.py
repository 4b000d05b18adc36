"""The variants of kernels that launches ask for, and their compilation before they are needed.

Triton compiles a kernel anew for other dtypes and constants, and for integers that are 1, a multiple of 16 or neither,
unless told not to look. A variant is one such case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Variant(NamedTuple):
    """One case of a kernel, with a launch that asks for it.

    Attributes:
        kernel: the kernel.
        key: what Triton tells apart, by argument.
        grid: of the launch.
        arguments: of the launch, in the kernel's order.
        options: of the launch: constants and compiler options by name.
    """

    kernel: Any
    key: tuple[tuple[str, Any], ...]
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__

    def compile(self) -> None:
        """Compile for the current device and put the result in Triton's cache, on disk and in this process."""
        self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)


class VariantList:
    """Collects the variants of launches: give `record` to `recorded_launches`."""

    def __init__(self) -> None:
        self._found: dict[Any, Variant] = {}

    def record(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        """Note a launch."""
        key = variant_key(kernel, arguments, options)
        self._found.setdefault(
            (kernel.fn.__qualname__, kernel.fn.__module__, key), Variant(kernel, key, grid, arguments, options)
        )

    @property
    def variants(self) -> list[Variant]:
        """Each variant once, in the order of their first launches."""
        return list(self._found.values())


def variant_key(kernel: Any, arguments: tuple, options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What Triton tells apart of a launch, by name of argument or option."""
    given = dict(zip((parameter.name for parameter in kernel.params), arguments)) | options
    known = {parameter.name: parameter for parameter in kernel.params}
    return tuple((name, _case_of(known.get(name), value)) for name, value in sorted(given.items()))


def _case_of(parameter: Any, value: Any) -> Any:
    if parameter is None or parameter.is_constexpr or value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if hasattr(value, "base"):
        return str(value.base.dtype), tuple(value.block_shape), repr(getattr(value, "layout", None))
    if isinstance(value, int):
        wide = "i64" if not -(2**31) <= value < 2**31 else "i32"
        if parameter.do_not_specialize:
            return wide
        if value == 1:
            return "1"
        return wide, not parameter.do_not_specialize_on_alignment and value % 16 == 0
    return type(value).__name__


def compile_all(variants: list[Variant], run: Callable[[Callable[[], None]], Any]) -> list[Any]:
    """`run(compile)` of every variant, the slow ones first; what `run` gave."""
    return [run(variant.compile) for variant in sorted(variants, key=lambda variant: -_weight(variant))]


def _weight(variant: Variant) -> int:
    """A longer kernel takes longer to compile; those in Gluon call many others."""
    return len(variant.kernel.src) + (10**6 if type(variant.kernel).__name__ == "GluonJITFunction" else 0)
