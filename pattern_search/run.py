"""Run a search from a checkpoint's name to a folder of results: what `indexcache search` calls."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..conversion.io.open_checkpoint import OpenedCheckpoint
from ..conversion.io.sources import ConversionError
from ..evaluation.overlap import Overlap, selection_overlap
from ..evaluation.perplexity import check_loss, evaluate_windows
from ..evaluation.streamed import streamed_overlap
from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ..runs.errors import RunError
from ..runs.fingerprint import state_sha256
from ..runs.journal import ScoreJournal
from ..runs.loading import Placement, load_model, open_model
from ..runs.monitor import Monitor
from ..runs.output import prepare_output
from ..runs.processes import Processes
from ..runs.run_options import RunOptions
from ..runs.streaming.layer_source import LayerSource, stream_model
from ..runs.windows.calibration import load_windows, short_window_warning
from ..runs.windows.tokenizer import Tokenizer, load_tokenizer
from ..runs.windows.windows import Windows
from .result import JOURNAL_FILE, SWEEPS_FILE, result_document, write_result
from .retrieval_guard import lost_retrieval, retrieval_windows
from .search import SearchOptions, search, search_identity
from .streaming import Streaming, SweepNotes, check_streamed

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class SearchRun(RunOptions):
    """Where a search runs, beside `RunOptions`; without `held_out`, windows for the checks are split off from `data`.

    Attributes:
        placement: where the model goes.
        parallel: what several processes share: the windows, or the model (tensor parallelism).
        cache_memory: for states between layers, such as `8GB`; None for a fourth of what is free.
        cache_on: `device`, or `host` to keep the states in host memory.
        stream: take layers from the checkpoint as they are needed, in place of loading the model.
    """

    placement: Placement = field(default_factory=Placement)
    parallel: Literal["windows", "tensor"] = "windows"
    cache_memory: str | None = None
    cache_on: Literal["device", "host"] = "device"
    stream: bool = False


def run_search(source: str, run: SearchRun, options: SearchOptions, monitor: Monitor) -> dict[str, Any]:
    """Load, search, write `patterns.json`; the result document.

    Raises:
        RunError: data, settings or journal that cannot be used.
        ConversionError: a source that is no DSA checkpoint.
    """
    processes = Processes.from_environment(run.parallel)
    if run.stream:
        check_streamed(options.scored_by, options.baselines)
        if processes.count > 1:
            raise RunError("--stream runs in one process: start it without torchrun, or leave --stream out")
    quiet = monitor if processes.is_first else Monitor()
    opened = open_model(source, run.placement)
    config = opened.config
    options.counts(config.share_pattern)
    tokenizer = load_tokenizer(opened.source)
    calibration, held_out = load_windows(run.data, config, tokenizer, run.sampling, run.held_out)
    warning = short_window_warning(calibration.seqlen, config.index_topk)
    if warning:
        quiet.warn(warning)
    retrieval = _retrieval(tokenizer, held_out, options, quiet)
    journal_path, cache_bytes = run.output / JOURNAL_FILE, _bytes(run.cache_memory)
    if processes.is_first:
        prepare_output(run.output, journal_path, run.resume, run.overwrite, "search")
    streamed = stream_model(opened, run.placement) if run.stream else None
    try:
        data = calibration, held_out, retrieval
        return _search(source, run, options, quiet, opened, data, warning, streamed, cache_bytes)
    finally:
        if streamed is not None:
            streamed.close()


def _search(
    source: str,
    run: SearchRun,
    options: SearchOptions,
    quiet: Monitor,
    opened: OpenedCheckpoint,
    data: tuple[Windows, Windows, Windows | None],
    warning: str | None,
    streamed: LayerSource | None,
    cache_bytes: int | None,
) -> dict[str, Any]:
    (calibration, held_out, retrieval), config, journal_path = data, opened.config, run.output / JOURNAL_FILE
    processes = Processes.from_environment(run.parallel)
    sha256 = None
    if streamed is None:
        sharded = processes.count > 1 and run.parallel == "tensor"
        model = load_model(opened, replace(run.placement, tensor_parallel=sharded))
        # Every comparison with a loss that is no number would be settled by chance; a sweep looks at its own.
        check_loss(evaluate_windows(model, calibration.ids[:1]).loss, source, model)
    else:
        model = streamed.model
        sha256 = state_sha256(model, streamed.state_items())
    identity = processes.share(search_identity(model, calibration, held_out, options, sha256))
    if processes.is_first:
        journal = ScoreJournal(journal_path, identity, run.resume, overwrite=run.overwrite)
    else:
        journal = ScoreJournal(None, identity)
    journal.adopt(processes.share(journal.records()))
    if journal.damage:
        quiet.warn(journal.damage)
    quiet.note(
        f"{source}: {len(calibration)} calibration windows of {calibration.seqlen:,} tokens, {len(held_out)} held out"
        + (f"; {journal.resumed} evaluations taken from {journal_path}" if journal.resumed else "")
    )
    streaming = None
    if streamed is not None:
        ahead = ScoreJournal(run.output / SWEEPS_FILE, identity, run.resume, overwrite=run.overwrite)
        streaming = Streaming(streamed, ahead, SweepNotes(streamed, quiet))
    try:
        with quiet:
            outcome = search(
                model,
                calibration,
                held_out,
                options,
                retrieval=retrieval,
                journal=journal,
                processes=processes,
                monitor=quiet,
                cache_bytes=_free_bytes(run, model) // 4 if cache_bytes is None else cache_bytes,
                cache_device=torch.device("cpu") if run.cache_on == "host" else None,
                streaming=streaming,
            )
        overlap = _overlap(model, calibration, streamed)
    finally:
        journal.close()
        if streaming is not None and streaming.ahead is not None:
            streaming.ahead.close()
    name = source if not Path(source).exists() else Path(source).resolve().name
    document = result_document(
        outcome,
        options,
        calibration,
        held_out,
        source=name,
        identity=identity,
        model_type=config.source_model_type,
    )
    if overlap is not None:
        document["overlap"] = {"layers": overlap.layers, "matrix": overlap.matrix.tolist()}
    asked = {count: outcome.patterns[count] for count in outcome.counts}
    losing = lost_retrieval(document["curve"], asked, outcome.start, options.least_recall)
    for text in losing:
        quiet.warn(text)
    if warnings := [text for text in (warning, journal.damage, *losing) if text]:
        document["warnings"] = warnings
    if processes.is_first:
        write_result(document, run.output)
    processes.wait()
    return document


def _retrieval(
    tokenizer: Tokenizer | None, held_out: Windows, options: SearchOptions, monitor: Monitor
) -> Windows | None:
    """Prompts that a tolerance is judged on, where tokens of the held-out windows are not marked."""
    if options.tolerance is None or not options.least_recall or held_out.recall_tokens:
        return None
    try:
        if tokenizer is None:
            raise RunError("the checkpoint has no tokenizer to make prompts with")
        return retrieval_windows(tokenizer, held_out)
    except (RunError, ConversionError) as error:
        monitor.warn(f"the tolerance is judged by loss alone, which hardly notices lost retrieval: {error}")
        return None


def _overlap(model: IndexCacheForCausalLM, windows: Windows, streamed: LayerSource | None) -> Overlap | None:
    """Of the selections on the first two windows; None where everything is selected."""
    if windows.seqlen <= (model.config.index_topk or windows.seqlen):
        return None
    ids = windows.ids[:2, :-1]
    return selection_overlap(model, ids) if streamed is None else streamed_overlap(streamed, ids)


def _bytes(size: str | None) -> int | None:
    if size is None:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?)i?b?", size.strip().lower())
    if found is None:
        raise RunError(f"--cache-memory {size!r} is no size: write 8GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2]])


def _free_bytes(run: SearchRun, model: IndexCacheForCausalLM) -> int:
    """What is free where the states are kept."""
    if model.device.type == "cuda" and run.cache_on == "device":
        return torch.cuda.mem_get_info(model.device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
