"""The names of kernels in Triton's cache, made so that they do not depend on what was compiled before.

Triton 3.6 digests a kernel with the constants of those functions that it calls whose own digest is made already: in
another order the same kernel has another name, and a cache that one process filled misses in the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import RLock
from types import CodeType, ModuleType
from typing import Any

_one_at_a_time = RLock()


def settle_key(kernel: Any) -> None:
    """Let Triton digest all that a kernel calls, and then the kernel itself.

    Args:
        kernel: of `triton.jit` or `gluon.jit`; what Triton's interpreter makes of one has no digest.
    """
    if getattr(kernel, "hash", "") is not None:
        return
    # Whoever waits here finds whole digests.
    with _one_at_a_time:
        _settle(kernel, set())


def _settle(function: Any, seen: set[int]) -> None:
    if id(function) in seen:
        return
    seen.add(id(function))
    for called in _referenced(function.fn.__code__, function.fn.__globals__):
        # Of the class: the property of an instance makes the digest.
        if hasattr(type(called), "cache_key") and called.hash is None:
            _settle(called, seen)
    function.cache_key  # noqa: B018 - a property that does its work when it is first read


def _referenced(code: Any, scope: dict[str, Any]) -> Iterator[Any]:
    """The globals that a function's code reads, attributes of modules and functions inside it included."""
    for name in code.co_names:
        value = scope.get(name)
        yield value
        if isinstance(value, ModuleType):
            yield from (getattr(value, attribute, None) for attribute in code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _referenced(inner, scope)
