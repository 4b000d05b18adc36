"""What a checkpoint needs on given GPUs, by pattern and placement: memory, what fits, times, and how to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..configuration.hub_code import AUTO_MAP
from ..configuration.share_pattern import SharePattern
from ..conversion.convert.families import INDEXCACHE, convert_config, indexer_layer, load_config
from ..conversion.io.fp8 import fp8_block_size, is_fp8
from ..conversion.io.open_checkpoint import OpenedCheckpoint, open_checkpoint
from ..conversion.io.sources import ConversionError, Source
from ..runs.errors import RunError
from .known_gpus import Gpu
from .loaded_weights import StoredTensor, loaded_tensors, model_dtype, multi_token_bytes
from .placement import LoadedModel, Placement, placements, why_not
from .rates import Rates, measured_rates
from .run_commands import run_commands
from .times import Figure, decode_rate, prefill_seconds

DEFAULT_LENGTH, DEFAULT_SHARE = 131072, "1/4"
# No batch is searched beyond.
_LARGEST_BATCH = 2**16


@dataclass(frozen=True)
class Wanted:
    """What is to be run.

    Attributes:
        gpus: how many there are.
        gpu: their kind.
        length: tokens of each sequence, prompt and answer; None: 131,072, or the model's longest.
        batch: sequences at a time.
        patterns: names, shares or letters to plan beside all F; empty: the checkpoint's own, and 1/4.
        cache: `static` or `dynamic`.
        chunk: tokens of each prompt that are prefilled at a time; 0: all.
    """

    gpus: int
    gpu: Gpu
    length: int | None = None
    batch: int = 1
    patterns: tuple[str, ...] = ()
    cache: str = "static"
    chunk: int = 0


def plan(source: Source, wanted: Wanted) -> dict[str, Any]:
    """All that `indexcache plan` shows, as JSON-ready values; sizes are bytes, of the GPU that needs most.

    Returns:
        `location`, `dtype`, `fp8`, `bytes` and `mtp_bytes` on disk, `gpu`, `gpus`, `length`, `batch`, `cache`,
        `prefill_chunk`;
        `patterns`, each with `name`, `pattern` and its `placements`: `memory` by kind, `total`, `fits`,
        `largest_length` (at the batch) and `largest_batch` (at the length; 0: none fits), `prefill` and `decode`
        figures with their labels, `commands`, or `why_not`; `skipped` patterns with the reason; `fits`, whether
        anything does; `notes`; `sources` of measured rates.

    Raises:
        ConversionError: the checkpoint cannot be read, or is not whole.
        RunError: a length or pattern that does not fit the model.
    """
    opened = open_checkpoint(source)
    longest = opened.config.max_position_embeddings
    length = min(DEFAULT_LENGTH, longest) if wanted.length is None else wanted.length
    if length > longest:
        raise RunError(f"--length {length:,} is beyond the model's max_position_embeddings, {longest:,}")
    if longest < 1:
        raise ConversionError(f"{source.location}: config.json has max_position_embeddings={longest}: fix it")
    stored = [StoredTensor(info.name, info.shape, info.dtype) for info in opened.checkpoint.tensors.values()]
    patterns, skipped = _patterns(opened, wanted.patterns)
    try:
        planned: list[dict[str, Any]] = [
            {
                "name": name,
                "pattern": pattern.letters,
                "full": pattern.num_full,
                "placements": _ways(opened, pattern, stored, wanted, length),
            }
            for name, pattern in patterns.items()
        ]
    except ArithmeticError as error:
        raise ConversionError(
            f"{source.location}: config.json has numbers that no model has ({error}): fix it"
        ) from error
    checkpoint = opened.checkpoint
    return {
        "location": source.location,
        "is_indexcache": checkpoint.config["model_type"] == INDEXCACHE,
        "dtype": model_dtype(opened.config, stored),
        "fp8": is_fp8(checkpoint.config),
        "bytes": checkpoint.nbytes,
        "mtp_bytes": multi_token_bytes(stored, len(opened.config.share_pattern)),
        "gpu": {"key": wanted.gpu.key, "name": wanted.gpu.name, "bytes": int(wanted.gpu.memory)}
        | {"bandwidth": wanted.gpu.bandwidth, "source": wanted.gpu.source},
        "gpus": wanted.gpus,
        "length": length,
        "longest": longest,
        "batch": wanted.batch,
        "cache": wanted.cache,
        "prefill_chunk": wanted.chunk or length,
        "patterns": planned,
        "skipped": skipped,
        "fits": any(entry["fits"] for part in planned for entry in part["placements"]),
        "notes": _notes(wanted, is_fp8(checkpoint.config), length),
        "sources": _sources(wanted.gpu, measured_rates()),
    }


def _ways(
    opened: OpenedCheckpoint, pattern: SharePattern, stored: Sequence[StoredTensor], wanted: Wanted, length: int
) -> list[dict[str, Any]]:
    """Every placement of the checkpoint with a pattern."""
    raw, location, config = opened.checkpoint.config, opened.source.location, opened.config
    if pattern != config.share_pattern:
        config = load_config(convert_config(raw, pattern, None, AUTO_MAP, location), location)
    narrow, dtype = is_fp8(raw), model_dtype(config, stored)
    model = LoadedModel(config, loaded_tensors(stored, config, dtype), dtype, narrow, wanted.cache, wanted.chunk)
    ways = []
    for placement in placements(wanted.gpus):
        reason = why_not(placement, config, model.tensors, fp8_block_size(raw, location) if narrow else None)
        entry: dict[str, Any] = {"name": placement.name, "way": placement.way, "gpus": placement.gpus}
        if reason is None:
            entry |= _placed(model, placement, wanted, length)
            entry["commands"] = run_commands(opened, placement, pattern, entry["layers"], length)
        else:
            entry |= {"fits": False, "why_not": reason}
        ways.append(entry)
    return ways


def _placed(model: LoadedModel, placement: Placement, wanted: Wanted, length: int) -> dict[str, Any]:
    """Memory, limits and times of one placement."""
    room, batch, rates = wanted.gpu.memory, wanted.batch, measured_rates()
    need = model.need(placement, batch, length)

    def fits(sequences: int, tokens: int) -> bool:
        return model.need(placement, sequences, tokens).total <= room

    prefill = prefill_seconds(model, placement, wanted.gpu, rates, batch, length)
    decode = decode_rate(model, placement, wanted.gpu, rates, batch, length)
    return {
        "memory": need.by_kind,
        "total": need.total,
        "layers": list(need.layers),
        "fits": need.total <= room,
        "largest_length": _largest(lambda tokens: fits(batch, tokens), model.config.max_position_embeddings),
        "largest_batch": _largest(lambda sequences: fits(sequences, length), _LARGEST_BATCH),
        "prefill": _figure(prefill, "seconds"),
        "decode": _figure(decode, "tokens_per_second"),
    }


def _figure(figure: Figure, name: str) -> dict[str, Any]:
    parts = {"parts_seconds": figure.parts} if figure.parts else {}
    return {name: figure.value, "label": figure.label, **parts, **({"source": figure.source} if figure.source else {})}


def _largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` for which `holds`, which fails for all above one that fails; 0 for none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _patterns(opened: OpenedCheckpoint, wanted: Sequence[str]) -> tuple[dict[str, SharePattern], dict[str, str]]:
    """Patterns by name, each once, and those that the checkpoint has no indexers for, with the reason.

    Raises:
        RunError: one that was asked for and does not fit the model.
    """
    layers, own = opened.config.num_hidden_layers, opened.config.share_pattern
    present = {indexer_layer(name) for name in opened.checkpoint.tensors}
    found: dict[str, SharePattern] = {}
    skipped: dict[str, str] = {}
    for name in ("all F", *(wanted or ("own", DEFAULT_SHARE))):
        try:
            pattern = _pattern(name, layers, own)
        except ValueError as error:
            raise RunError(f"--pattern {name!r}: {error}") from error
        lacking = [layer for layer in pattern.full_layers if layer not in present]
        reason = f"the checkpoint has no indexers in layers {_ranges(lacking)}" if lacking else None
        if reason and name in wanted:
            raise RunError(f"--pattern {name!r}: {reason}, which it makes full")
        if reason:
            skipped[name] = reason
        elif pattern not in found.values():
            found[name] = pattern
    return found, skipped


def _pattern(name: str, layers: int, own: SharePattern) -> SharePattern:
    if name in ("all F", "all full"):
        return SharePattern.all_full(layers)
    if name == "own":
        return own
    return SharePattern.parse(name, layers) if set(name) <= {"F", "S"} else SharePattern.uniform(layers, name)


def _ranges(layers: Sequence[int]) -> str:
    """`3-5, 7`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _notes(wanted: Wanted, narrow: bool, length: int) -> list[str]:
    """What the figures leave out."""
    gpu = wanted.gpu
    chunks = f"in chunks of {wanted.chunk:,} tokens" if 0 < wanted.chunk < length else "of this length all at once"
    notes = [f"weights and cache are exact; the prefill workspace is reckoned, for prompts {chunks}"]
    if 0 < wanted.chunk < length:
        notes.append("times are those of whole prompts; chunks take longer")
    if gpu.rates_of is None:
        notes.append(f"nothing was measured on {gpu.name}: times are bounds by its data sheet")
    elif gpu.rates_of != gpu.key:
        notes.append(f"kernels were measured on an {gpu.rates_of.upper()}, which has the same compute units")
    if narrow:
        notes.append("products with fp8 weights have not been measured: times with them are bounds, no estimates")
    if wanted.gpus > 1:
        notes.append(
            "device_map runs its GPUs one after another; tensor and expert parallel have not been measured, and their "
            "decoding steps are not recorded as graphs: they take longer than the bound"
        )
    return notes


def _sources(gpu: Gpu, rates: Rates) -> list[str]:
    return list(dict.fromkeys(rates.sources_of(gpu.rates_of) + rates.sources_of(gpu.key)))
