"""Kernels compiled before a model is loaded: into Triton's cache, in parallel processes, with or without a GPU.

Triton's cache tells apart what a kernel is compiled from: its source, the case of its arguments, compiler options,
Triton's own build, ptxas and the architecture. Nothing of the machine that compiles is among them, so a cache that was
filled without a GPU serves one, with the same Triton, the same release of this package and the same environment
variables of Triton's.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...kernels.common.device_target import TARGETS, DeviceTarget, device_target
from ...kernels.compilation.compile_process import NoDriver, build_launcher
from ...kernels.compilation.kernel_variants import Variant
from ...modeling_indexcache.compile_ahead import (
    LENGTHS,
    Prefill,
    kinds_of_layers,
    prefills,
    pretended_decoder,
    variants_of,
)
from ...modeling_indexcache.modeling_indexcache import IndexCacheModel
from ..convert.families import convert_config, load_config
from ..io.sources import ConversionError
from .bundle import AUTO_MAP

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class WarmUp(NamedTuple):
    """What was compiled.

    Attributes:
        target: for which device.
        variants: how many there are.
        compiled: how many were not in the cache before.
        failed: error messages by kernel name.
        seconds: all together.
        cache: Triton's cache folder.
    """

    target: DeviceTarget
    variants: int
    compiled: int
    failed: dict[str, str]
    seconds: float
    cache: str


def warm_up(
    source: str,
    *,
    dtype: str = "auto",
    max_length: int | None = None,
    jobs: int | None = None,
    target: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    on_variant: Callable[[str], Any] = lambda name: None,
) -> WarmUp:
    """Compile all that a checkpoint's kernels need, of whatever length its prompts are.

    Args:
        source: a DSA or IndexCache checkpoint, a folder or Hub id; of it the config alone is read.
        dtype: `bfloat16` or `float16` of its weights, or `auto`: what the config says.
        max_length: longest prompt to compile for; None: 100,000, and longer ones need nothing more.
        jobs: processes; None: one a processor.
        target: an architecture of `TARGETS`; None: the GPU here.
        revision: of a Hub source.
        token: of the Hub.
        on_variant: called with the kernel's name when one is compiled.

    Raises:
        ConversionError: no such checkpoint, dtype or target; no Triton, or no GPU and no target.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConversionError("there is nothing to compile: triton is not installed (pip install triton)")
    fields, wanted = _fields(source, revision, token), _target(target)
    lengths = tuple(length for length in LENGTHS if length <= (max_length or LENGTHS[-1]))
    lengths += (max_length,) if max_length is not None and max_length not in lengths else ()
    arguments = (fields, source, _dtype(dtype, fields), wanted, lengths)
    start = time.perf_counter()
    # Every process finds the same variants in the same order, so that numbers name them.
    number = len(_find_variants(*arguments))
    failed, before = {}, _entries()
    pool = ProcessPoolExecutor(
        min(number, jobs or os.cpu_count() or 1),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=arguments,
    )
    with pool:
        for done in as_completed([pool.submit(_compile, variant) for variant in range(number)]):
            name, error = done.result()
            on_variant(name)
            if error is not None:
                failed[name] = error
    seconds = time.perf_counter() - start
    return WarmUp(wanted, number, len(_entries() - before), failed, seconds, str(_cache()))


def _fields(source: str, revision: str | None, token: str | None) -> dict[str, Any]:
    """The checkpoint's config as an IndexCache config's fields."""
    from transformers import PreTrainedConfig

    try:
        fields, _ = PreTrainedConfig.get_config_dict(source, revision=revision, token=token)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{source}: {error}") from error
    if not fields:
        raise ConversionError(f"{source} has no config.json: give a checkpoint's folder or a Hub id (org/name)")
    return convert_config(fields, None, None, AUTO_MAP, source)


def _dtype(wanted: str, fields: dict[str, Any]) -> str:
    name = wanted if wanted != "auto" else str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise ConversionError(f"kernels run in {' and '.join(DTYPES)}, not in {name}: give --dtype")
    return name


def _target(wanted: str | None) -> DeviceTarget:
    if wanted is None:
        if not torch.cuda.is_available():
            raise ConversionError(f"there is no GPU here: give --target, one of {', '.join(TARGETS)}")
        return device_target(torch.device("cuda", torch.cuda.current_device()))
    if wanted not in TARGETS:
        raise ConversionError(f"--target {wanted!r} is none of {', '.join(TARGETS)}")
    return TARGETS[wanted]


def _find_variants(
    fields: dict[str, Any], source: str, dtype: str, target: DeviceTarget, lengths: tuple[int, ...]
) -> list[Variant]:
    """All variants; those that take longest to compile first."""
    config = load_config(fields, source)
    pattern = str(config.share_pattern)
    model = pretended_decoder(IndexCacheModel, config, kinds_of_layers(config, pattern), pattern, DTYPES[dtype])
    # One row without padding, as most are, and a padded batch.
    begun_with = [*prefills(lengths), *(Prefill(2, length, masked=True) for length in lengths)]
    found = [variant for fresh in variants_of(model, target, begun_with) for variant in fresh]
    return sorted(found, key=lambda variant: -len(variant.kernel.src))


def no_driver(target: DeviceTarget) -> NoDriver:
    """In place of Triton's driver: compile for `target`."""
    return NoDriver(target.backend, target.arch, 64 if target.backend == "hip" else 32)


_variants: list[Variant] = []


def _begin(*arguments: Any) -> None:
    """Prepare a process of the pool."""
    from triton.runtime.driver import driver

    # One thread a process: the processes are the parallelism.
    torch.set_num_threads(1)
    driver.set_active(no_driver(arguments[3]))
    _variants.extend(_find_variants(*arguments))


def _compile(number: int) -> tuple[str, str | None]:
    variant = _variants[number]
    try:
        build_launcher(variant.compile())
    except Exception as error:
        return variant.name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return variant.name, None


def _cache() -> Path:
    import triton

    return Path(triton.knobs.cache.dir)


def _entries() -> set[str]:
    return {str(path) for ending in ("cubin", "hsaco") for path in _cache().glob(f"*/*.{ending}")}
