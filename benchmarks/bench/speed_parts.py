"""Where the time of a forward goes: indexer, selection, attention, experts, projections, rest.

On CUDA kernels are told apart by name (torch.profiler); on the CPU the model's own functions are timed from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from ...modeling_indexcache import modeling_indexcache
from ...modeling_indexcache.attention import dense_attention, inference_attention
from ...modeling_indexcache.layers import expert_router, indexer

PARTS = ("indexer", "selection", "attention", "experts", "projections", "rest")
# The first of these found in a kernel's name says its part. On Hopper prefill lists candidates in the indexer's kernel
# and selects among them in one of its own; elsewhere it selects inside.
_KERNELS = (
    ("indexer_filter", "selection"),
    ("indexer_select", "selection"),
    ("finish_rows", "selection"),
    ("lightning_indexer", "indexer"),
    ("indexer", "indexer"),
    ("sparse_mla", "attention"),
    ("merge_key_lists", "attention"),
    ("flash", "attention"),
    ("fmha", "attention"),
    ("expert", "experts"),
    ("gated_kernel", "experts"),
    ("copy_rows", "experts"),
    ("combine_kernel", "experts"),
    ("GroupProblemShape", "experts"),
    ("grouped", "experts"),
    ("RadixSort", "experts"),
    ("radix", "experts"),
    ("searchsorted", "experts"),
    ("gemm", "projections"),
    ("gemv", "projections"),
    ("nvjet", "projections"),
    ("cutlass", "projections"),
    ("splitK", "projections"),
    ("linear", "projections"),
)


def part_of_kernel(name: str) -> str:
    """The part that a CUDA kernel belongs to."""
    return next((part for piece, part in _KERNELS if piece.lower() in name.lower()), "rest")


def breakdown(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of each part in one call."""
    return _kernel_parts(call) if device.type == "cuda" else _function_parts(call)


def _kernel_parts(call: Callable[[], Any]) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        found[part_of_kernel(event.key)] += event.self_device_time_total / 1e3
    return found


class _Stopwatch:
    """Time by part; the time of a part inside another counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open = ["rest"]
        self._since = time.perf_counter()

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def _function_parts(call: Callable[[], Any]) -> dict[str, float]:
    watch = _Stopwatch()
    # A linear layer is a projection, unless it runs inside an expert or the router.
    experts = {"experts": modeling_indexcache.IndexCacheMoE, "projections": nn.Linear}
    with ExitStack() as stack:
        for module, function, part in (
            (indexer, "lightning_indexer", "indexer"),
            (inference_attention, "sparse_mla", "attention"),
            (dense_attention, "attend_expanded", "attention"),
            (expert_router, "expert_topk", "experts"),
        ):
            stack.enter_context(patch.object(module, function, watch.wrap(part, getattr(module, function))))
        for part, kind in experts.items():
            forward = kind.forward  # type: ignore[attr-defined]

            def replaced(self: Any, *args: Any, _forward: Any = forward, _part: str = part, **kwargs: Any) -> Any:
                inside_experts = watch._open[-1] == "experts"
                with watch.part("experts" if inside_experts else _part):
                    return _forward(self, *args, **kwargs)

            stack.enter_context(patch.object(kind, "forward", replaced))
        watch.seconds = dict.fromkeys(PARTS, 0.0)
        watch._since = time.perf_counter()
        call()
        watch._switch()
    return {part: 1e3 * seconds for part, seconds in watch.seconds.items()}
