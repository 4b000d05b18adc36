"""One run of `indexcache bench`: what to measure in which order, each row on disk before the next is begun."""

from __future__ import annotations

import platform
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from ...conversion.io.open_checkpoint import OpenedCheckpoint, open_checkpoint
from ...conversion.io.shard_writer import write_json
from ...kernels.common.early_launch import launches_in_turn
from ...modeling_indexcache.attention.attention_backends import resolve_attention_backend
from ...modeling_indexcache.compile_ahead import finish_compiling
from ...runs.errors import RunError
from ...runs.journal import Journal
from ...runs.loading import check_device
from ...runs.output import prepare_output
from ...runs.versions import stamp
from . import speed_models
from .speed_measures import (
    cache_bytes,
    full_cache_rows,
    measure_full_cache_decode,
    measure_generate,
    neighbour_overlap,
)
from .speed_models import checkpoint_model, patterns_of, peer_model, prompt, random_config, random_model
from .speed_parts import breakdown
from .speed_plan import OURS, PEER, Row

JOURNAL_FILE, RESULT_FILE = "journal.jsonl", "bench.json"
# The peer has no memory for longer prompts at once and takes them in chunks, as `generate` offers.
PEER_ONE_SHOT, PEER_CHUNK = 8192, 512
# Tokens of the call before a model's first row: libraries load, allocators grow and clocks rise outside the figures.
WARM_UP_TOKENS, WARM_UP_STEPS = 4096, 8
# Queries behind the context whose selections are compared with one another.
OVERLAP_QUERIES = 256


@dataclass
class BenchOptions:
    """What to measure; lengths are tokens.

    Attributes:
        source: a checkpoint, or None for a shape with random weights.
        shape: `30b`, `tiny`, or a slice: `v3.2`, `glm-5`.
        experts: routed experts in place of the shape's.
        layers: decoder layers in place of the shape's.
        narrow: small widths in place of a slice's.
        lengths: context lengths of prefill and decode.
        patterns: see `speed_models.patterns_of`; the first is what others are compared with.
        input: `drift` or `random`.
        ways: caches of `generate`: `static`, `dynamic`.
        decode_steps: tokens timed.
        batch_sizes: sequences in a full static cache, for decode throughput; 0: as many as fit.
        parts: break the time down.
        peer_lengths: lengths at which transformers' own model runs beside ours.
        repeats: calls of `generate`, of which the best counts.
        rows: what to measure in which order, in place of what `lengths` to `repeats` ask for.
    """

    source: str | None = None
    shape: str = "30b"
    experts: int | None = None
    layers: int | None = None
    narrow: bool = False
    lengths: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()
    input: str = "drift"
    ways: tuple[str, ...] = ("static",)
    decode_steps: int = 32
    batch_sizes: tuple[int, ...] = ()
    parts: bool = True
    peer_lengths: tuple[int, ...] = ()
    repeats: int = 2
    device: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    rows: tuple[Row, ...] = ()


class RowJournal(Journal):
    """Rows measured so far, a JSON line each, on disk before the next row begins."""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> None:
        self.rows: dict[Row, dict[str, Any]] = {}
        super().__init__(path, identity, resume, "benchmark", overwrite)

    def add_row(self, row: Row, found: dict[str, Any]) -> None:
        """Record a row's result."""
        self.rows[row] = found
        self._write({"row": vars(row), "found": found})

    def _take(self, record: dict[str, Any]) -> None:
        """See `Journal`."""
        if not isinstance(record["found"], dict):
            raise TypeError("what a row found is an object")
        self.rows[Row(**record["row"])] = record["found"]


Progress = Callable[[Row, dict[str, Any], bool], None]


def run_bench(
    options: BenchOptions, output: Path, resume: bool, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Measure every row that the journal lacks.

    Args:
        options: what to measure.
        output: folder of the journal and the result.
        resume: go on from the journal there.
        overwrite: forget it.
        progress: called after every row with its result, and whether it came from the journal.

    Returns:
        The document that is also written to `bench.json`.

    Raises:
        RunError: options that cannot be measured, or a journal of another run.
    """
    device = check_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    opened = None
    if options.source is not None:
        opened = open_checkpoint(options.source, revision=options.revision, token=options.token)
    dtype = _dtype(options.dtype, device)
    identity = {
        **{
            name: value
            for name, value in vars(options).items()
            if name in ("source", "shape", "experts", "layers", "narrow", "input", "decode_steps", "revision")
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": options.dtype if options.dtype == "fp8" else str(dtype).removeprefix("torch."),
    }
    prepare_output(output, output / JOURNAL_FILE, resume, overwrite, "benchmark")
    journal = RowJournal(output / JOURNAL_FILE, identity, resume, overwrite)
    models = _Models(options, opened, device, dtype)
    wanted = list(options.patterns) + [row.pattern for row in options.rows]
    patterns = patterns_of(models.config, list(dict.fromkeys(wanted)))
    _check_lengths(options, models.config)

    def write() -> dict[str, Any]:
        document = _document(options, identity, models.config, patterns, journal)
        write_json(output / RESULT_FILE, document)
        return document

    bench = _Bench(options, journal, progress, models, patterns)
    for row in bench.plan():
        if bench.measure(row):
            write()
    journal.close()
    return write()


class _Models:
    """Our model and transformers' own, one at a time where their weights are random."""

    def __init__(
        self, options: BenchOptions, opened: OpenedCheckpoint | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.options, self.device, self.dtype = options, device, dtype
        self._ours: Any = None
        self._peer: tuple[str, Any] | None = None
        if opened is not None:
            self._ours = checkpoint_model(opened, device, dtype, options.token)
        self.config = self._ours.config if self._ours is not None else random_config(*self._shape, options.narrow)

    @property
    def _shape(self) -> tuple[str, int | None, int | None]:
        return self.options.shape, self.options.experts, self.options.layers

    def ours(self, pattern: str) -> Any:
        """Our model, running `pattern`."""
        self._peer = None
        if self._ours is None:
            _release(self.device)
            options = self.options
            self._ours = random_model(
                *self._shape, self.device, self.dtype, narrow=options.narrow, block_fp8=options.dtype == "fp8"
            )
        self._ours.to(self.device).set_index_share_pattern(pattern)
        return self._ours

    def peer(self, pattern: str) -> Any:
        """Transformers' own with random weights."""
        if self._peer is None or self._peer[0] != pattern:
            # Both would not fit at the lengths where they are compared.
            self._peer = None
            self._ours = None if self.options.source is None else self._ours.to("cpu")
            _release(self.device)
            self._peer = (pattern, peer_model(self.config, self.dtype, pattern, self.device))
        return self._peer[1]


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Bench:
    """Runs rows."""

    def __init__(
        self, options: BenchOptions, journal: RowJournal, progress: Progress, models: _Models, patterns: dict
    ) -> None:
        self.options, self.journal, self.progress, self.patterns = options, journal, progress, patterns
        self.models, self._own_fp8 = models, models.config.indexer_fp8
        self._inspected: tuple[Any, dict[str, Any]] = (None, {})
        self._warm: Callable[[], Any] = lambda: None

    def plan(self) -> Iterator[Row]:
        """Rows in order: kernels are compiled at the shortest length, and a cut-off loses what matters least."""
        options, names = self.options, list(self.patterns)
        if options.rows:
            yield from options.rows
            return
        lengths = sorted(set(options.lengths))
        for way in options.ways:
            for tokens in lengths:
                for name in names:
                    yield Row("generate", OURS, tokens, name, way)
        if options.parts:
            for name in names:
                yield Row("parts", OURS, lengths[-1], name, "prefill")
                yield Row("parts", OURS, lengths[-1], name, "decode")
        for tokens in reversed(lengths):
            yield Row("overlap", OURS, tokens, names[-1])
        for tokens in lengths:
            for batch in options.batch_sizes:
                for name in names:
                    yield Row("full cache", OURS, tokens, name, "", batch)
        for name in names:
            for tokens in sorted(set(options.peer_lengths)):
                yield Row("generate", PEER, tokens, name, "dynamic")

    def measure(self, row: Row) -> bool:
        """Measure a row unless the journal has it; whether it was measured. Out of memory is a result."""
        if row in self.journal.rows:
            self.progress(row, self.journal.rows[row], True)
            return False
        start = time.perf_counter()
        try:
            found = self._measure(row)
        except torch.cuda.OutOfMemoryError as error:
            found = {"out_of_memory": str(error).split(". ")[0]}
        _release(self.models.device)
        found["took_seconds"] = round(time.perf_counter() - start, 2)
        self.journal.add_row(row, found)
        self.progress(row, found, False)
        return True

    def _measure(self, row: Row) -> dict[str, Any]:
        options, pattern = self.options, self.patterns[row.pattern]
        model = self.models.ours(pattern) if row.model == OURS else self.models.peer(pattern)
        if row.model == OURS:
            model.config.indexer_fp8 = row.indexer == "e4m3" or self._own_fp8
        if row.kind == "full cache":
            batch = row.batch or _largest_batch(model, full_cache_rows(row.tokens, options.decode_steps))
            if batch == 0:
                return {"out_of_memory": "not one sequence fits beside the weights"}
            found = measure_full_cache_decode(model, row.tokens, batch, options.decode_steps)
            return {**found, "batch": batch}
        kind = row.input or options.input
        if row.kind == "generate":
            chunk = PEER_CHUNK if row.model == PEER and row.tokens > PEER_ONE_SHOT else None
            ids, repeats = prompt(model, row.tokens, kind), row.repeats or options.repeats
            warm = min(WARM_UP_TOKENS, row.tokens)
            if self._warm() is not model:
                measure_generate(model, ids[:, :warm], row.way, WARM_UP_STEPS, 1, chunk)
                finish_compiling()
                self._warm = weakref.ref(model)
            return measure_generate(model, ids, row.way, options.decode_steps, repeats, chunk)
        inspected = row.tokens, row.pattern, kind
        if self._inspected[0] != inspected:
            self._inspected = (None, {})
            self._inspected = (inspected, _inspect(model, row.tokens, kind))
        found = self._inspected[1]
        return found["overlap"] if row.kind == "overlap" else {"milliseconds": found[row.way]}


@torch.no_grad()
def _inspect(model: Any, tokens: int, kind: str) -> dict[str, Any]:
    """Parts of a prefill and of a decoding step behind it, and how far the queries after them agree."""
    steps = 7
    ids = prompt(model, tokens + steps + OVERLAP_QUERIES, kind)
    cache = DynamicCache(config=model.config)

    def run(first: int, last: int) -> Callable[[], Any]:
        return lambda: model(ids[:, first:last], past_key_values=cache, logits_to_keep=1)

    found: dict[str, Any] = {"prefill": breakdown(run(0, tokens), ids.device)}
    with launches_in_turn():
        for step in range(tokens, tokens + steps - 1):
            run(step, step + 1)()
        found["decode"] = breakdown(run(tokens + steps - 1, tokens + steps), ids.device)
    found["overlap"] = neighbour_overlap(model, ids[:, tokens + steps :], cache)
    return found


def _largest_batch(model: Any, rows: int) -> int:
    """Sequences whose caches fit in 95 % of what the weights leave; 8 on the CPU."""
    if model.device.type != "cuda":
        return 8
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.full((1, 16), 7, device=model.device), past_key_values=cache)
    per_token = cache_bytes(cache) / 16
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(0.95 * free // (per_token * rows))


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name in ("auto", "fp8"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _check_lengths(options: BenchOptions, config: Any) -> None:
    longest = config.max_position_embeddings
    planned = tuple(row.tokens for row in options.rows)
    for name, lengths in (
        ("--length", options.lengths),
        ("--baseline-length", options.peer_lengths),
        ("--plan: length", planned),
    ):
        for tokens in lengths:
            if not 16 <= tokens <= longest:
                raise RunError(f"{name} {tokens} must lie in 16 .. {longest}, the model's longest context")
    if options.source is not None and options.input == "drift":
        raise RunError("--input drift makes an embedding table of its own: it is for --shape, not for a checkpoint")
    if not options.lengths and not planned:
        raise RunError("--length: give at least one context length")
    family = config.source_model_type
    peers = options.peer_lengths or any(row.model == PEER for row in options.rows)
    if peers and options.dtype == "fp8":
        raise RunError("transformers' own model runs without fp8: leave out --dtype fp8, or --baseline and its rows")
    if options.source is not None and peers and family not in (None, "glm_moe_dsa"):
        raise RunError(f"--baseline runs transformers' glm_moe_dsa, and {options.source} is {family}: leave it out")


def _document(
    options: BenchOptions, identity: dict[str, Any], config: Any, patterns: dict[str, str], journal: RowJournal
) -> dict[str, Any]:
    return {
        "what": options.source or f"{options.shape} shape, random weights",
        **identity,
        "versions": stamp(),
        "backend": resolve_attention_backend(None),
        "layers": config.num_hidden_layers,
        "routed_experts": config.n_routed_experts,
        "drift": {"step": speed_models.DRIFT_STEP, "spread": speed_models.DRIFT_SPREAD},
        "patterns": patterns,
        "rows": [{**vars(row), **found} for row, found in journal.rows.items()],
        **({"warnings": [journal.damage]} if journal.damage else {}),
    }
