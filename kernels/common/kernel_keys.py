"""The names of kernels in Triton's cache, made so that they do not depend on what was compiled before.

Triton 3.6 digests a kernel with the constants of those functions that it calls whose own digest is made already: in
another order the same kernel has another name, and a cache that one process filled misses in the next.
"""

from __future__ import annotations

from threading import RLock
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
    for name in _names(function.fn.__code__):
        called = function.fn.__globals__.get(name)
        if getattr(called, "hash", "") is None and hasattr(called, "cache_key"):
            _settle(called, seen)
    function.cache_key  # noqa: B018 - a property that does its work when it is first read


def _names(code: Any) -> tuple[str, ...]:
    """The globals that a function's code reads, functions inside it included."""
    inner = [name for each in code.co_consts if hasattr(each, "co_names") for name in _names(each)]
    return (*code.co_names, *inner)
