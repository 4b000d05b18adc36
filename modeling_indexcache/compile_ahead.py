"""Kernels compiled before they are needed: what a model will launch is known from its config alone.

A model of as many layers as there are kinds of layers runs on tensors without memory (`pretended_tensors.py`), a
prefill and some decoding steps at several lengths, and its launches are recorded. In a process that has a GPU, the
first prefill starts this in the background: threads compile the variants while it goes on, and processes as soon as
they are there (`compile_process.py`). `indexcache warm-up` does it for an image or a cluster, without a GPU too.

INDEXCACHE_COMPILE_AHEAD=0 switches the background off, any other number says how many threads there are, and
INDEXCACHE_COMPILE_PROCESSES how many processes.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from ..kernels.block_fp8.block_fp8_format import E4M3
from ..kernels.common.device_target import DeviceTarget, device_target
from ..kernels.common.kernel_launch import launcher
from ..kernels.common.pretended_tensors import PretendedTensor, pretended, pretended_launches
from ..kernels.compilation.compile_process import CLOSED, CompileProcess, processes_wanted
from ..kernels.compilation.kernel_variants import Compilations, Variant, VariantList
from .attention.attention_backends import TRITON_ATTENTION
from .eligibility import why_not_compiled_ahead
from .layers.block_fp8_modules import block_size_of, put_block_fp8, scales_name

logger = logging.get_logger(__name__)

COMPILE_AHEAD = "INDEXCACHE_COMPILE_AHEAD"
# More only take Python's lock from the thread that waits: on 16 cores 6 have a first token ready after 2.8 s, 16 after
# 6.9 (benchmarks/results/first_token_h200.json).
MOST_THREADS = 6
# Prompts that between them ask for every variant, whatever the length: few tokens, more tokens than top-k and fewer,
# chunks of a long prompt. What a length changes beyond that is not compiled for.
LENGTHS = (16, 1000, 4096, 8192, 100_000)
# Tokens of a conversation's next message.
TURN = 200
# The last of these steps is recorded, and its kernels launch early.
STEPS = 4

_started: set[tuple[Any, ...]] = set()
_running: list[threading.Thread] = []
_lock = threading.Lock()
# Of each model what its config held, and the hash of that: a config is compared in a few microseconds.
_kinds: weakref.WeakKeyDictionary[torch.nn.Module, tuple[dict[str, Any], str]] = weakref.WeakKeyDictionary()


def compile_ahead(model: Any, hidden_states: torch.Tensor, masked: bool = False) -> None:
    """Start to compile, in the background, what this decoder will launch; once per kind of model and device.

    Args:
        model: `IndexCacheModel`.
        hidden_states: `[B, S, hidden_size]` of its first forward on this device.
        masked: some tokens are padding; the first such forward begins with what padded batches need.
    """
    jobs = _threads()
    if jobs == 0 or why_not_compiled_ahead(model, hidden_states):
        return
    kind = (_kind_of(model), hidden_states.dtype, hidden_states.device)
    with _lock:
        if (*kind, masked) in _started:
            return
        # Padded batches' includes the others'.
        _started.update({(*kind, masked), (*kind, False)})
    first = Prefill(hidden_states.shape[0], hidden_states.shape[1], masked)
    mark = _mark(model, hidden_states, first)
    if mark is not None and mark.exists():
        return
    # Not the model: its memory is its owner's to free.
    dtypes = {name: x.dtype for name, x in (*model.named_parameters(), *model.named_buffers())}
    small = (type(model), model.config, str(model._running_pattern), dtypes)
    arguments = (small, hidden_states.device, first, jobs, mark)
    thread = threading.Thread(target=_work, args=arguments, name="indexcache-compile-ahead")
    thread.start()
    _running.append(thread)


def finish_compiling() -> None:
    """Wait until all that was begun is compiled: before time is measured, say."""
    while _running:
        _running.pop().join()


def small_model(cls: Any, config: Any, pattern: str, dtypes: dict[str, torch.dtype]) -> Any:
    """A `pretended_decoder` with one layer of each kind; `dtypes` of the model's parameters and buffers, by name."""
    kept = kinds_of_layers(config, pattern)
    small = pretended_decoder(cls, config, kept, pattern)

    def kind_of(name: str) -> torch.dtype | None:
        place = name.split(".")
        if place[0] == "layers":
            place[1] = str(kept[int(place[1])])
        return dtypes.get(".".join(place))

    if E4M3 in dtypes.values():
        put_block_fp8(small, block_size_of(config), lambda name, experts: kind_of(scales_name(name, experts)))
    for path, held, name, tensor in _tensors_of(small):
        dtype = kind_of(path)
        if dtype is not None and not (isinstance(tensor, PretendedTensor) and tensor.dtype == dtype):
            held[name] = pretended(torch.empty(tensor.shape, dtype=dtype, device="meta"))
    return small


def _tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, dict[str, Any], str, torch.Tensor]]:
    """Every parameter and buffer: its path, and the dict and the name that it is kept under, to be replaced."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None:
                    yield f"{path}.{name}".lstrip("."), held, name, tensor


def pretended_decoder(cls: Any, config: Any, kept: list[int], pattern: str, dtype: torch.dtype | None = None) -> Any:
    """`cls` of the layers `kept` of a config's, with tensors without memory.

    Args:
        cls: `IndexCacheModel`.
        config: of the whole model.
        kept: which layers.
        pattern: the share pattern that the whole model runs.
        dtype: of the weights, but those that `from_pretrained` keeps in fp32; None: fp32.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(kept)
    config.index_share_pattern = "".join(pattern[layer] for layer in kept)
    config.mlp_layer_types = [config.mlp_layer_types[layer] for layer in kept]
    config.layer_types = [config.layer_types[layer] for layer in kept]
    # Not the config's own backend, which this machine may not run.
    config._attn_implementation_internal = "sdpa"
    with torch.device("meta"):
        model = cls(config).eval()
    model.config._attn_implementation_internal = TRITON_ATTENTION
    # Where this package's kernels do not run, the implementation that needs no GPU.
    model.config._experts_implementation_internal = "batched_mm"
    wide = cls._keep_in_fp32_modules_strict or []
    for _, held, name, tensor in _tensors_of(model):
        narrow = dtype is not None and isinstance(tensor, torch.nn.Parameter) and name not in wide
        held[name] = pretended(tensor.to(dtype) if narrow else tensor)
    return model


class Prefill(NamedTuple):
    """What a conversation begins with: rows, tokens of each, and whether some of them are padding."""

    batch: int
    tokens: int
    masked: bool


def prefills(lengths: Iterable[int] = LENGTHS, first: Prefill | None = None) -> list[Prefill]:
    """What between them asks for every variant, that which comes first ahead of the others.

    Args:
        lengths: tokens of prompts.
        first: what comes first. A padded batch brings other lengths of its kind with it, as long as all its rows have
            no more tokens than the longest prompt.
    """
    lengths = tuple(lengths)
    found = [Prefill(1, length, False) for length in lengths]
    if first is None:
        return found
    if first.masked:
        found += [first._replace(tokens=n) for n in lengths if n * first.batch <= max(lengths)]
    return list(dict.fromkeys((first, *found)))


def variants_of(model: Any, target: DeviceTarget, begun_with: Iterable[Prefill]) -> Iterator[list[Variant]]:
    """New variants of a prefill, then of decoding steps, then of another turn's prefill, for each conversation.

    Args:
        model: what `small_model` or `pretended_decoder` gives.
        target: what to compile for.
        begun_with: the conversations.
    """
    found, known = VariantList(), 0
    for batch, length, masked in begun_with:
        with pretended_launches(target, found.record):
            cache, past = DynamicCache(config=model.config), 0
            for tokens in (length, *[1] * STEPS, TURN):
                past += tokens
                ids = torch.empty(batch, tokens, dtype=torch.int64, device="cuda")
                # No mask: `generate` hands none on that masks nothing.
                mask = torch.empty(batch, past, dtype=torch.int64, device="cuda") if masked else None
                model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
                fresh = found.variants[known:]
                if fresh:
                    known += len(fresh)
                    yield fresh


def _work(small: tuple[Any, ...], device: torch.device, first: Prefill, jobs: int, mark: Path | None) -> None:
    process = _side_process(device)
    compilations = Compilations(device, jobs, process)
    whole = False
    try:
        found = variants_of(small_model(*small), device_target(device), prefills(first=first))
        for number, fresh in enumerate(found):
            # The first prefill launches in this order; of what comes later the longest to compile begin first.
            compilations.add(fresh if number == 0 else sorted(fresh, key=lambda variant: -len(variant.kernel.src)))
            if not threading.main_thread().is_alive():
                return
        whole = True
    except Exception as error:
        # What is not known ahead is compiled when it is needed: nothing else depends on this.
        logger.debug("IndexCache: kernels are not compiled ahead: %s: %s", type(error).__name__, error)
    finally:
        done = compilations.finish()
        if process is not None and process.why_gone != CLOSED:
            logger.debug("IndexCache: kernels were compiled in threads: %s", process.why_gone)
    if whole and mark is not None and not any(done.values()):
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            logger.debug("IndexCache: %s: %s", mark, error)


def _side_process(device: torch.device) -> CompileProcess | None:
    """What compiles outside this process, or None where threads do it all."""
    number = processes_wanted()
    if number == 0:
        return None
    try:
        from triton.runtime.driver import driver

        with torch.cuda.device(device):
            target = driver.active.get_current_target()
        return CompileProcess(number, (target.backend, target.arch, target.warp_size))
    except Exception as error:
        logger.debug("IndexCache: kernels are compiled in threads alone: %s: %s", type(error).__name__, error)
        return None


def _threads() -> int:
    wanted = os.environ.get(COMPILE_AHEAD, "")
    if wanted.isdigit():
        return int(wanted)
    return min(MOST_THREADS, os.cpu_count() or 1)


def kinds_of_layers(config: Any, pattern: str) -> list[int]:
    """The first layer of each kind: dense or sparse feed-forward, with or without an indexer."""
    layers = list(zip(config.mlp_layer_types, pattern))
    return [layers.index(kind) for kind in dict.fromkeys(layers)]


def _kind_of(model: Any) -> str:
    """A hash of what decides on kernels in a model's config, all but the number of layers; anew where it changed."""
    known = _kinds.get(model)
    if known is None or known[0] != vars(model.config):
        ignored = ("num_hidden_layers", "_name_or_path")
        fields = sorted((name, value) for name, value in model.config.to_dict().items() if name not in ignored)
        known = copy.deepcopy(vars(model.config)), hashlib.sha256(repr(fields).encode()).hexdigest()
        _kinds[model] = known
    return known[1]


def _mark(model: Any, hidden_states: torch.Tensor, first: Prefill) -> Path | None:
    """A file in Triton's cache whose presence says that all this was compiled before."""
    try:
        import triton

        folder = Path(triton.knobs.cache.dir)
        place = (
            triton.__version__,
            _kind_of(model),
            str(model._running_pattern),
            str(hidden_states.dtype),
            (first.batch, True) if first.masked else (1, False),
            device_target(hidden_states.device),
            _code(),
        )
    except Exception:
        return None
    return folder / f"indexcache-{hashlib.sha256(repr(place).encode()).hexdigest()[:32]}"


def _code() -> str:
    """A digest of the kernels' source as it is here."""
    digest = hashlib.sha256()
    # Beside a checkpoint all files are in one folder, in the package in one of kernels' folders.
    here = Path(launcher.__code__.co_filename).parent
    folder = here.parent if here.name == "common" else here
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
