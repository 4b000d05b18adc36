"""One run of `indexcache bench`: what to measure in which order, each row on disk before the next is begun."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from .errors import BenchError
from .speed_measures import (
    cache_bytes,
    measure_full_cache_decode,
    measure_generate,
    neighbour_overlap,
)
from .speed_models import checkpoint_model, patterns_of, peer_model, prompt, random_model
from .speed_parts import breakdown

JOURNAL_FILE, RESULT_FILE = "journal.jsonl", "bench.json"
OURS, PEER = "indexcache", "transformers"


@dataclass
class BenchOptions:
    """What to measure; lengths are tokens.

    Attributes:
        source: a checkpoint, or None for a shape with random weights.
        shape: `30b` or `tiny`.
        experts: routed experts in place of the shape's.
        layers: decoder layers in place of the shape's.
        lengths: context lengths of prefill and decode.
        patterns: see `speed_models.patterns_of`; the first is what others are compared with.
        input: `drift` or `random`.
        ways: caches of `generate`: `static`, `dynamic`.
        decode_steps: tokens timed.
        batch_sizes: sequences in a full static cache, for decode throughput; 0: as many as fit.
        parts: break the time down.
        peer_lengths: lengths at which transformers' own model runs beside ours.
        repeats: calls of `generate`, of which the best counts.
    """

    source: str | None = None
    shape: str = "30b"
    experts: int | None = None
    layers: int | None = None
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


@dataclass(frozen=True)
class Row:
    """One measurement: `kind` generate, full cache, parts or overlap."""

    kind: str
    model: str
    tokens: int
    pattern: str
    way: str = ""
    batch: int = 1


class Journal:
    """Rows measured so far, a JSON line each, on disk before the next row begins."""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> None:
        self.path = path
        self.rows: dict[Row, dict[str, Any]] = {}
        if path.exists() and not overwrite:
            if not resume:
                raise BenchError(f"{path} holds an earlier run: go on with --resume, or use --overwrite")
            self._read(identity)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")

    def add(self, row: Row, found: dict[str, Any]) -> None:
        """Record a row's result."""
        self.rows[row] = found
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": vars(row), "found": found}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, identity: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):  # a crash left half a line
            with self.path.open("r+b") as file:
                file.truncate(complete)
        try:
            first, *lines = [json.loads(line) for line in content[:complete].splitlines()]
            earlier = first["identity"]
            self.rows = {Row(**line["row"]): line["found"] for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{self.path} is damaged ({error}): start again with --overwrite") from error
        if differing := [key for key in identity if earlier.get(key) != identity[key]]:
            changes = "; ".join(f"{key}: {earlier.get(key)} there, {identity[key]} now" for key in differing)
            raise BenchError(f"{self.path} belongs to another run ({changes}): use --overwrite or another --output")


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
        BenchError: options that cannot be measured, or a journal of another run.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch sees no CUDA device")
    dtype = _dtype(options.dtype, device)
    identity = {
        **{
            name: value
            for name, value in vars(options).items()
            if name in ("source", "shape", "experts", "layers", "input", "decode_steps", "revision")
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
    }
    journal = Journal(output / JOURNAL_FILE, identity, resume, overwrite)
    if options.source is not None:
        model = checkpoint_model(options.source, device, dtype, options.revision, options.token)
    else:
        model = random_model(options.shape, options.experts, device, dtype, options.layers)
    patterns = patterns_of(model, list(options.patterns))
    _check_lengths(options, model)
    bench = _Bench(options, journal, progress, model, patterns)
    for row in bench.plan():
        bench.measure(row)
    document = _document(options, identity, model, patterns, journal)
    bench.close()
    path = output / RESULT_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return document


class _Bench:
    """Runs rows, keeping the model and its peer between them."""

    def __init__(
        self, options: BenchOptions, journal: Journal, progress: Progress, model: Any, patterns: dict
    ) -> None:
        self.options, self.journal, self.progress, self.patterns = options, journal, progress, patterns
        self.model: Any = model
        self.shape = model
        self.peer: tuple[str, Any] | None = None

    def plan(self) -> Iterator[Row]:
        """Rows in order: kernels are compiled at the shortest length, and a cut-off loses what matters least."""
        options, names = self.options, list(self.patterns)
        lengths = sorted(set(options.lengths))
        for way in options.ways:
            for tokens in lengths:
                for name in names:
                    yield Row("generate", OURS, tokens, name, way)
        if options.parts:
            for name in names:
                yield Row("parts", OURS, lengths[-1], name, "prefill")
                yield Row("parts", OURS, lengths[-1], name, "decode")
        for tokens in lengths:
            yield Row("overlap", OURS, tokens, names[-1])
        for tokens in lengths:
            for batch in options.batch_sizes:
                for name in names:
                    yield Row("full cache", OURS, tokens, name, "", batch)
        for name in names:
            for tokens in sorted(set(options.peer_lengths)):
                yield Row("generate", PEER, tokens, name, "dynamic")

    def measure(self, row: Row) -> None:
        """Measure a row unless the journal has it. Out of memory is a result."""
        if row in self.journal.rows:
            self.progress(row, self.journal.rows[row], True)
            return
        start = time.perf_counter()
        try:
            found = self._measure(row)
        except torch.cuda.OutOfMemoryError as error:
            found = {"out_of_memory": str(error).split(". ")[0]}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        found["took_seconds"] = round(time.perf_counter() - start, 2)
        self.journal.add(row, found)
        self.progress(row, found, False)

    def close(self) -> None:
        """Let go of the models."""
        self.model = self.peer = None

    def _measure(self, row: Row) -> dict[str, Any]:
        options = self.options
        model = self._model(row)
        if row.kind == "full cache":
            batch = row.batch or _largest_batch(model, row.tokens)
            if batch == 0:
                return {"out_of_memory": "not one sequence fits beside the weights"}
            found = measure_full_cache_decode(model, row.tokens, batch, options.decode_steps)
            return {**found, "batch": batch}
        ids = prompt(model, row.tokens, options.input)
        if row.kind == "generate":
            return measure_generate(model, ids, row.way, options.decode_steps, options.repeats)
        if row.kind == "overlap":
            return {"layers": neighbour_overlap(model, ids)}
        return {"milliseconds": self._parts(model, ids, row.way)}

    @torch.no_grad()
    def _parts(self, model: Any, ids: torch.Tensor, way: str) -> dict[str, float]:
        cache = DynamicCache(config=model.config)

        def prefill() -> None:
            model(ids, past_key_values=cache, logits_to_keep=1)

        if way == "prefill":
            return breakdown(prefill, model.device)
        prefill()
        token = torch.full((1, 1), 7, device=model.device)
        for _ in range(6):
            model(token, past_key_values=cache)
        return breakdown(lambda: model(token, past_key_values=cache), model.device)

    def _model(self, row: Row) -> Any:
        pattern = self.patterns[row.pattern]
        if row.model == OURS:
            self.model.set_index_share_pattern(pattern)
            return self.model
        if self.peer is None or self.peer[0] != pattern:
            self.peer = None
            if self.model is not None and self.model.device.type == "cuda":
                # Both would not fit at the lengths where they are compared.
                self.model.to("meta") if self.options.source is None else self.model.to("cpu")
                torch.cuda.empty_cache()
            self.peer = (pattern, peer_model(self.shape, pattern, self.device))
        return self.peer[1]

    @property
    def device(self) -> torch.device:
        """Where to measure."""
        return torch.device(self.options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _largest_batch(model: Any, tokens: int) -> int:
    """Sequences whose caches fit in 95 % of what the weights leave; 8 on the CPU."""
    if model.device.type != "cuda":
        return 8
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.full((1, 16), 7, device=model.device), past_key_values=cache)
    per_token = cache_bytes(cache) / 16
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(0.95 * free // (per_token * (tokens + 1)))


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _check_lengths(options: BenchOptions, model: Any) -> None:
    longest = model.config.max_position_embeddings
    for name, lengths in (("--length", options.lengths), ("--peer-length", options.peer_lengths)):
        for tokens in lengths:
            if not 16 <= tokens <= longest:
                raise BenchError(f"{name} {tokens} must lie in 16 .. {longest}, the model's longest context")
    if options.source is not None and options.input == "drift":
        raise BenchError("--input drift makes an embedding table of its own: it is for --shape, not for a checkpoint")
    if not options.lengths:
        raise BenchError("--length: give at least one context length")
    family = model.config.source_model_type
    if options.source is not None and options.peer_lengths and family not in (None, "glm_moe_dsa"):
        raise BenchError(f"--peer runs transformers' glm_moe_dsa, and {options.source} is {family}: leave it out")


def _document(
    options: BenchOptions, identity: dict[str, Any], model: Any, patterns: dict[str, str], journal: Journal
) -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    try:
        versions["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        versions["triton"] = "none"
    config = model.config
    return {
        "what": options.source or f"{options.shape} shape, random weights",
        **identity,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "backend": config._attn_implementation,
        "layers": config.num_hidden_layers,
        "routed_experts": config.n_routed_experts,
        "patterns": patterns,
        "rows": [{**vars(row), **found} for row, found in journal.rows.items()],
    }
