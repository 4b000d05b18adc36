"""Evaluate checkpoints and patterns side by side: what `indexcache eval` calls.

Every batch of windows and every sample of prompts is journaled under the hashes of what it was run on, so that an
interrupted evaluation goes on where it stopped, and further checkpoints, patterns or tasks can be added to one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..configuration.configuration_indexcache import IndexCacheConfig
from ..configuration.share_pattern import SharePattern
from ..conversion.io.open_checkpoint import OpenedCheckpoint
from ..conversion.io.shard_writer import write_json
from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ..runs.errors import RunError
from ..runs.fingerprint import model_sha256, state_sha256
from ..runs.journal import ScoreJournal
from ..runs.loading import Placement, load_model, open_model
from ..runs.monitor import Monitor
from ..runs.output import prepare_output
from ..runs.streaming.layer_source import LayerSource, stream_model
from ..runs.versions import stamp
from ..runs.windows.tokenizer import Tokenizer, load_tokenizer
from ..runs.windows.window_sources import DEFAULT_SAMPLES, Sampling, default_seqlen, read_windows
from ..runs.windows.windows import Windows, refuse_foreign_tokens
from .overlap import selection_overlap
from .perplexity import check_loss, paired_rise, token_scores
from .retrieval import KINDS, Prompt, PromptMaker, recalled
from .streamed import last_hidden_states, streamed_overlap

FORMAT = "indexcache-evaluation/1"
EVALUATION_FILE, JOURNAL_FILE, REPORT_FILE = "evaluation.json", "journal.jsonl", "report.html"
TASKS = ("perplexity", "retrieval", "overlap")
# Parts of a window whose losses are listed; context lengths of retrieval by default, times top-k.
POSITION_BINS, LENGTH_FACTORS = 8, (8, 16, 32)
# Windows that overlap is measured on.
OVERLAP_WINDOWS = 2


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate.

    Attributes:
        tasks: some of `TASKS`; None for those that the data allow.
        data: windows for perplexity and overlap, text between the facts of retrieval; see `window_sources.py`.
        patterns: share patterns to run each checkpoint with, after its own.
        sampling: how windows are taken.
        prompt: `records` or `passkey`.
        lengths: context lengths of retrieval in tokens; None for 8, 16 and 32 times top-k.
        depths: depths of retrieval.
        samples: samples a length.
        batch_size: windows or prompts in one forward.
    """

    tasks: tuple[str, ...] | None = None
    data: str | None = None
    patterns: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    prompt: str = "records"
    lengths: tuple[int, ...] | None = None
    depths: int = 5
    samples: int = 8
    batch_size: int = 1

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks or () if task not in TASKS]:
            raise RunError(f"--task must be {', '.join(TASKS)} (got {', '.join(unknown)})")
        if self.prompt not in KINDS:
            raise RunError(f"--prompt must be {' or '.join(KINDS)} (got {self.prompt!r})")
        needy = [task for task in self.tasks or () if task != "retrieval"]
        if needy and self.data is None:
            raise RunError(f"--task {needy[0]} needs --data: text, .jsonl, .safetensors or a dataset's name")
        for name, value in (("samples", self.samples), ("batch-size", self.batch_size), ("depths", self.depths)):
            if value < 1:
                raise RunError(f"--{name} must be at least 1 (got {value})")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The tasks in force."""
        if self.tasks is not None:
            return tuple(task for task in TASKS if task in self.tasks)
        return TASKS if self.data is not None else ("retrieval",)


@dataclass(frozen=True)
class Inputs:
    """What one checkpoint is run on.

    Attributes:
        windows: for perplexity and overlap.
        prompts: samples of retrieval by length, each a list of prompts.
    """

    windows: Windows | None
    prompts: dict[int, list[list[Prompt]]]


def run_evaluation(
    sources: list[str],
    options: EvaluationOptions,
    output: Path,
    *,
    placement: Placement | None = None,
    resume: bool = False,
    overwrite: bool = False,
    monitor: Monitor | None = None,
    stream: bool = False,
) -> dict[str, Any]:
    """Run every task on every checkpoint and pattern, write `evaluation.json`; the document.

    Args:
        sources: DSA or IndexCache checkpoints: folders or Hub ids.
        options: what to evaluate.
        output: folder for the result and the journal.
        placement: where the models go.
        resume: go on from the journal in `output`.
        overwrite: forget it.
        monitor: shows progress.
        stream: take layers from the checkpoints as they are needed, in place of loading the models.

    Returns:
        `models` (name, pattern and hash of each column), `perplexity`, `retrieval` and `overlap` (scores by model's
        number), `data`, `recipe`, `versions`.

    Raises:
        RunError: data, patterns or settings that cannot be used, before any model is loaded where possible.
        ConversionError: a source that is no DSA checkpoint.
    """
    monitor, placement = monitor or Monitor(), placement or Placement()
    begun = time.monotonic()
    if stream and "retrieval" in options.wanted:
        raise RunError("retrieval generates token by token and is not streamed: give --task perplexity with --stream")
    opened = [open_model(source, placement) for source in sources]
    configs = [one.config for one in opened]
    inputs = [_inputs(source, one, options) for source, one in zip(sources, opened)]
    columns = [_patterns(source, config, options) for source, config in zip(sources, configs)]
    path = output / JOURNAL_FILE
    prepare_output(output, path, resume, overwrite, "evaluation")
    journal = ScoreJournal(path, {"format": FORMAT}, resume, work="evaluation", overwrite=overwrite)
    if journal.damage:
        monitor.warn(journal.damage)
    document: dict[str, Any] = {"format": FORMAT, "models": []} | {task: [] for task in options.wanted}
    names = _names(sources)
    try:
        with monitor:
            for source, checkpoint, name, given, patterns in zip(sources, opened, names, inputs, columns):
                source_of = stream_model(checkpoint, placement) if stream else None
                model = load_model(checkpoint, placement) if source_of is None else source_of.model
                runner = _Runner(model, options, journal, monitor, name, source_of)
                runner.sweep(patterns, given)
                for pattern in patterns:
                    number = len(document["models"])
                    document["models"].append(_about(source, name, pattern, model, runner.sha256))
                    for task in options.wanted:
                        scores = getattr(runner, task)(pattern, given)
                        if scores is not None:
                            document[task].append({"model": number, **scores})
                if source_of is not None:
                    document.setdefault("streamed", []).append({"source": name, **asdict(source_of.reading)})
                    source_of.close()
                del runner, model, source_of
    finally:
        journal.close()
    _compare(document)
    versions = stamp()
    document |= {
        "data": [_data(source, given) for source, given in zip(names, inputs)],
        "recipe": asdict(options),
        "versions": versions,
        "date": versions["date"],
        "seconds": round(time.monotonic() - begun, 1),
        "evaluations_resumed": journal.resumed,
    }
    if journal.damage:
        document["warnings"] = [journal.damage]
    write_json(output / EVALUATION_FILE, document)
    return document


# ---- inputs -------------------------------------------------------------------------------------------------------


def _patterns(source: str, config: IndexCacheConfig, options: EvaluationOptions) -> list[SharePattern]:
    own = config.share_pattern
    found = [own]
    for text in options.patterns:
        try:
            pattern = SharePattern.parse(text, config.num_hidden_layers)
        except ValueError as error:
            raise RunError(f"--pattern for {source}: {error}") from error
        if without := [layer for layer in pattern.full_layers if not own.is_full(layer)]:
            raise RunError(f"--pattern {pattern} makes layers {without} full, and {source} has no indexer there")
        if pattern not in found:
            found.append(pattern)
    return found


def _inputs(source: str, opened: OpenedCheckpoint, options: EvaluationOptions) -> Inputs:
    config, tokenizer = opened.config, load_tokenizer(opened.source)
    windows = None
    prompts: dict[int, list[list[Prompt]]] = {}
    if {"perplexity", "overlap"} & set(options.wanted):
        assert options.data is not None
        seqlen = options.sampling.seqlen or default_seqlen(config.max_position_embeddings, config.index_topk)
        count = options.sampling.nsamples or DEFAULT_SAMPLES
        windows = read_windows(options.data, tokenizer, options.sampling, seqlen, count)
        refuse_foreign_tokens(windows.ids, config.vocab_size, f"{windows.origin} holds", source)
        if "overlap" in options.wanted and windows.seqlen <= (config.index_topk or windows.seqlen):
            raise RunError(
                f"--task overlap: windows of {windows.seqlen:,} tokens cannot tell selections apart, {source} selects "
                f"{config.index_topk} keys: give a longer --seqlen, or other tasks with --task"
            )
    if "retrieval" in options.wanted:
        if tokenizer is None:
            raise RunError(f"--task retrieval needs a tokenizer, and {source} has none: give other tasks")
        prompts = _prompts(source, config, options, tokenizer)
    return Inputs(windows, prompts)


def _prompts(
    source: str, config: IndexCacheConfig, options: EvaluationOptions, tokenizer: Tokenizer
) -> dict[int, list[list[Prompt]]]:
    topk, longest = config.index_topk or 64, config.max_position_embeddings
    lengths = options.lengths or sorted({min(longest, factor * topk) for factor in LENGTH_FACTORS})
    for length in lengths:
        if length > longest:
            raise RunError(f"--length {length:,} is beyond {source}'s max_position_embeddings of {longest:,}")
    filler = None
    if options.data is not None:
        seqlen = options.sampling.seqlen or max(lengths)
        wanted = replace(options.sampling, nsamples=options.samples)
        filler = read_windows(options.data, tokenizer, wanted, seqlen, options.samples).ids.flatten().tolist()
    maker = PromptMaker(tokenizer, options.prompt, options.depths, filler)
    return {
        length: [maker.make(length, sample, options.sampling.seed) for sample in range(options.samples)]
        for length in lengths
    }


def _names(sources: list[str]) -> list[str]:
    """Short names; whole paths where short ones are the same."""
    short = [Path(source).resolve().name if Path(source).exists() else source for source in sources]
    return [source if short.count(name) > 1 else name for source, name in zip(sources, short)]


# ---- tasks --------------------------------------------------------------------------------------------------------


class _Runner:
    """One loaded checkpoint; each task gives the scores of one pattern."""

    def __init__(
        self,
        model: IndexCacheForCausalLM,
        options: EvaluationOptions,
        journal: ScoreJournal,
        monitor: Monitor,
        name: str,
        source: LayerSource | None = None,
    ) -> None:
        self.source = source
        self.model, self.options, self.journal, self.monitor, self.name = model, options, journal, monitor, name
        self.sha256 = model_sha256(model) if source is None else state_sha256(model, source.state_items())
        self._where = f"{self.sha256[:24]}/{model.dtype}/{model.config._attn_implementation}"

    def sweep(self, patterns: list[SharePattern], given: Inputs) -> None:
        """Where layers are streamed, score all patterns on all windows together, as far as that is not known."""
        windows = given.windows
        if self.source is None or windows is None or "perplexity" not in self.options.wanted:
            return
        key, parts = self._batches(windows)
        missing = [
            (number, pattern.letters)
            for pattern in patterns
            for number in range(len(parts))
            if self.journal.peek(key, pattern.letters, number) is None
        ]
        self.monitor.begin(f"sweep through {self.name}", len(missing))
        for (number, letters), hidden in last_hidden_states(self.source, parts, missing):
            table = _window_table(self.model, parts[number], partial(_given, hidden))
            self.journal.add(key, letters, number, table, 0)
            self.monitor.step()

    def _batches(self, windows: Windows) -> tuple[str, list[Windows]]:
        """The journal's name of losses on these windows, and the windows of each forward."""
        size = self.options.batch_size
        parts = [windows.select(slice(first, first + size)) for first in range(0, len(windows), size)]
        return f"perplexity/{windows.sha256()[:24]}/{size}/{self._where}", parts

    def perplexity(self, pattern: SharePattern, given: Inputs) -> dict[str, Any]:
        """Losses over the windows, and by their place in a window."""
        windows = given.windows
        assert windows is not None
        key, parts = self._batches(windows)
        tables = []
        self._begin("perplexity", pattern, len(parts))
        for number, part in enumerate(parts):
            tables.append(self._once(key, pattern, number, lambda part=part: _window_table(self.model, part)))
            self.monitor.step(f"loss {float(torch.cat(tables)[:, 0].mean()) / windows.seqlen:.4f}")
        table = torch.cat(tables)
        tokens, recalls = len(windows) * windows.seqlen, windows.recall_tokens
        loss, text, recall, hits = (float(table[:, column].sum()) for column in range(4))
        check_loss(loss / tokens, f"{self.name} with the pattern {pattern}", self.model)
        bins = _bins(windows.seqlen)
        by_position = [float(x) / len(windows) / len(part) for x, part in zip(table[:, 4:].sum(0), bins)]
        found: dict[str, Any] = {
            "windows_sha256": windows.sha256(),
            "loss": loss / tokens,
            "perplexity": math.exp(loss / tokens),
            "text_loss": text / max(1, tokens - recalls),
            "window_losses": (table[:, 0] / windows.seqlen).tolist(),
            "by_position": [{"until": part.stop, "loss": mean} for part, mean in zip(bins, by_position)],
        }
        if recalls:
            found |= {"recall_loss": recall / recalls, "recall": hits / recalls, "recall_tokens": recalls}
        return found

    def retrieval(self, pattern: SharePattern, given: Inputs) -> dict[str, Any]:
        """Share of answers given, by length and depth."""
        lengths = []
        total = sum(map(len, given.prompts.values()))
        self._begin("retrieval", pattern, total)
        for length, samples in given.prompts.items():
            tables = []
            digest = hashlib.sha256(repr([prompt for sample in samples for prompt in sample]).encode()).hexdigest()
            key = f"retrieval/{digest[:24]}/{self._where}"
            for number, prompts in enumerate(samples):
                tables.append(self._once(key, pattern, number, lambda prompts=prompts: self._hits(prompts)))
                self.monitor.step(f"{length:,} tokens {float(torch.cat(tables).mean()):.0%}")
            hits = torch.cat(tables)  # [samples, depths]
            accuracy = float(hits.mean())
            depths = [depth for prompt in samples[0] for depth in prompt.depths]
            lengths.append(
                {
                    "length": length,
                    "accuracy": accuracy,
                    "standard_error": math.sqrt(accuracy * (1 - accuracy) / hits.numel()),
                    "answers": hits.numel(),
                    "by_depth": [
                        {"depth": depth, "accuracy": float(mean)} for depth, mean in zip(depths, hits.mean(0))
                    ],
                }
            )
        return {"prompt": self.options.prompt, "lengths": lengths}

    def overlap(self, pattern: SharePattern, given: Inputs) -> dict[str, Any]:
        """Overlap of the full layers' own selections, and what the shared layers of the pattern get of theirs."""
        assert given.windows is not None
        own = self.model.config.share_pattern
        windows = given.windows.select(slice(0, OVERLAP_WINDOWS))
        key = f"overlap/{windows.sha256()[:24]}/{self._where}"
        self._begin("overlap", pattern, len(windows))
        tables = []
        for number, row in enumerate(windows.ids):
            run = lambda row=row: self._overlap_of(row[None, :-1])
            tables.append(self._once(key, own, number, run))
            self.monitor.step(f"window {number + 1}")
        matrix = torch.stack(tables).mean(0)
        layers = own.full_layers
        served = [
            float(matrix[layers.index(layer), layers.index(pattern.source_of(layer))])
            for layer in pattern.shared_layers
            if layer in layers
        ]
        return {
            "layers": layers,
            "matrix": matrix.tolist(),
            "neighbours": torch.diagonal(matrix, 1).tolist(),
            "shared_layers": sum(served) / len(served) if served else None,
        }

    def _overlap_of(self, ids: torch.Tensor) -> torch.Tensor:
        return (
            selection_overlap(self.model, ids) if self.source is None else streamed_overlap(self.source, ids)
        ).matrix

    def _hits(self, prompts: list[Prompt]) -> torch.Tensor:
        answers = recalled(self.model, prompts, self.options.batch_size)
        return torch.tensor([[float(hit) for prompt in answers for hit in prompt]], dtype=torch.float64)

    def _begin(self, task: str, pattern: SharePattern, steps: int) -> None:
        self.monitor.begin(f"{task} of {self.name} {pattern}", steps)

    def _once(self, key: str, pattern: SharePattern, number: int, run: Any) -> torch.Tensor:
        known = self.journal.get(key, pattern.letters, number)
        if known is None:
            self.model.set_index_share_pattern(pattern)
            known = run()
            self.journal.add(key, pattern.letters, number, known, 0)
        return known


def _given(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The hidden states that a sweep has made of `ids`."""
    return hidden


def _window_table(
    model: IndexCacheForCausalLM, windows: Windows, hidden_of: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Sums per window, fp64 `[N, 4 + bins]`: loss, loss of text, loss of recalled tokens, hits, loss by position."""
    rows, first = [], 0
    for losses, hits in token_scores(model, windows.ids, windows.recall, len(windows), hidden_of):
        marks = torch.zeros_like(hits)
        if windows.recall is not None:
            marks = windows.recall[first : first + len(losses), 1:].bool().cpu()
        first += len(losses)
        sums = [losses, losses * ~marks, losses * marks, (hits & marks).double()]
        parts = [losses[:, part.start : part.stop].sum(-1) for part in _bins(windows.seqlen)]
        rows.append(torch.stack([x.sum(-1) for x in sums] + parts, dim=-1))
    return torch.cat(rows)


def _bins(seqlen: int) -> list[range]:
    """Even parts of a window."""
    count = min(POSITION_BINS, seqlen)
    ends = [seqlen * i // count for i in range(count + 1)]
    return [range(first, last) for first, last in pairwise(ends)]


def _compare(document: dict[str, Any]) -> None:
    """Add to each perplexity its rise over the first column's, with the standard error of the paired difference."""
    scores = document.get("perplexity")
    if not scores:
        return
    first = scores[0]["window_losses"]
    for entry in scores[1:]:
        if entry["windows_sha256"] != scores[0]["windows_sha256"]:
            continue
        entry["rise"], error = paired_rise(entry["window_losses"], first)
        if error is not None:
            entry["rise_standard_error"] = error


def _about(source: str, name: str, pattern: SharePattern, model: IndexCacheForCausalLM, sha256: str) -> dict[str, Any]:
    return {
        "name": name,
        "source": source if not Path(source).exists() else Path(source).resolve().name,
        "pattern": pattern.letters,
        "own_pattern": pattern == model.config.share_pattern,
        "full_layers": pattern.num_full,
        "num_layers": len(pattern),
        "sha256": sha256,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
    }


def _data(source: str, given: Inputs) -> dict[str, Any]:
    found: dict[str, Any] = {"source": source}
    if given.windows is not None:
        windows = given.windows
        found |= {"origin": windows.origin, "windows": len(windows), "seqlen": windows.seqlen}
        found["sha256"] = windows.sha256()
    return found
