"""The whole training-free search: patterns for every number of full layers, refined, checked on held-out windows."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from ..configuration.share_pattern import FULL, SharePattern, count_to_keep
from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ..runs.errors import RunError
from ..runs.fingerprint import model_sha256
from ..runs.journal import ScoreJournal
from ..runs.monitor import Monitor
from ..runs.processes import Processes
from ..runs.windows.windows import Windows
from .algorithms.floating import refine
from .algorithms.greedy import Step, greedy
from .algorithms.lazy_greedy import lazy_greedy
from .measure.evaluator import OBJECTIVES, TEACHERS, Evaluation, Evaluator
from .measure.prefix_cache import PrefixCache
from .measure.similarity import output_similarity, similarity_patterns
from .measure.streamed_evaluator import StreamedEvaluator
from .retrieval_guard import DEFAULT_LEAST_RECALL, RetrievalGuard
from .streaming import Streaming, check_streamed

DEFAULT_KEEP = ("1/2", "1/4", "1/8")
# Batches of held-out windows that all patterns are checked on before the next ones.
CHECKED_TOGETHER = 8


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        keep: numbers of full layers that matter most (counts or shares): they are refined and checked.
        tolerance: choose the smallest number of full layers whose held-out loss is within this share of the start's.
        least_recall: what `tolerance` chooses must recall, see `RetrievalGuard`; 0 looks at the loss alone.
        algorithm: `lazy` or `greedy` (the paper's: every candidate on every window).
        objective: `kl`, `far-kl` or `lm`; None for `kl` with `lazy` and `lm` with `greedy`.
        teacher: whose predictions `kl` measures the distance to: `dense`, `source` or `auto`, see `Evaluator`.
        blocks: pipeline blocks of `greedy`.
        path_rounds: rounds of windows that decide the steps of `lazy`; all decide the refinement.
        refine_passes: moves at most by which a pattern asked for is refined; 0 for none, always none with `greedy`.
        refine_by: `lm` or `objective`: what refinement lowers.
        baselines: `uniform`, `similarity`, searched or built for comparison.
        curve: check every number of full layers on the held-out windows, not only those asked for.
        batch_size: windows in one forward.
    """

    keep: tuple[str, ...] = DEFAULT_KEEP
    tolerance: float | None = None
    least_recall: float = DEFAULT_LEAST_RECALL
    algorithm: Literal["lazy", "greedy"] = "lazy"
    objective: str | None = None
    teacher: str = "auto"
    blocks: int = 1
    path_rounds: int = 3
    refine_passes: int = 2
    refine_by: Literal["lm", "objective"] = "objective"
    baselines: tuple[str, ...] = ("uniform",)
    curve: bool = True
    batch_size: int = 1

    @property
    def refines(self) -> bool:
        """Whether patterns asked for are refined."""
        return self.algorithm == "lazy" and self.refine_passes > 0

    @property
    def scored_by(self) -> str:
        """The objective in force."""
        return self.objective or ("kl" if self.algorithm == "lazy" else "lm")

    def counts(self, start: SharePattern) -> list[int]:
        """The numbers of full layers asked for, largest first.

        Raises:
            RunError: below 1, above what the model has, or no number.
        """
        found = set()
        for keep in self.keep:
            try:
                count = count_to_keep(len(start), keep)
            except ValueError as error:
                raise RunError(f"--keep {keep}: {error}") from error
            if count > start.num_full:
                raise RunError(
                    f"--keep {keep} asks for {count} full layers, and the source has indexers in {start.num_full} only"
                )
            found.add(max(count, self.blocks))
        return sorted(found, reverse=True)


@dataclass
class SearchOutcome:
    """What a search found; `result.py` writes it.

    Attributes:
        start: the pattern that it began with.
        counts: the numbers of full layers asked for.
        steps: the path, layer by layer.
        patterns: the best pattern by number of full layers.
        baselines: patterns by number of full layers, by name of the baseline.
        calibration: evaluations on the calibration windows, by pattern.
        held_out: evaluations on the held-out windows, by pattern.
        teacher: whose predictions KL was measured to, `dense` or `source`; None without KL.
        chosen: the number of full layers that `tolerance` chose, or None.
        retrieval: what `RetrievalGuard` found, or None where it was not asked.
        cost: layer-forwards and evaluations by part, and seconds of this run.
    """

    start: str
    counts: list[int]
    steps: list[Step] = field(default_factory=list)
    patterns: dict[int, str] = field(default_factory=dict)
    baselines: dict[str, dict[int, str]] = field(default_factory=dict)
    calibration: dict[str, Evaluation] = field(default_factory=dict)
    held_out: dict[str, Evaluation] = field(default_factory=dict)
    teacher: str | None = None
    chosen: int | None = None
    retrieval: dict[str, Any] | None = None
    cost: dict[str, Any] = field(default_factory=dict)


def search(
    model: IndexCacheForCausalLM,
    calibration: Windows,
    held_out: Windows,
    options: SearchOptions = SearchOptions(),
    *,
    retrieval: Windows | None = None,
    journal: ScoreJournal | None = None,
    processes: Processes | None = None,
    monitor: Monitor | None = None,
    cache_bytes: int = 2**31,
    cache_device: torch.device | None = None,
    streaming: Streaming | None = None,
) -> SearchOutcome:
    """Search a model's share patterns without training.

    Args:
        model: whose pattern the search begins with: all full, or the full layers that a checkpoint has left.
        calibration: windows that decide.
        held_out: windows that check, and that `tolerance` is judged on.
        options: how.
        retrieval: windows whose marked tokens `tolerance` is judged on, too; None for the held-out ones, if marked.
        journal: evaluations done before, and where new ones go; `search_identity` says what it must belong to.
        processes: who shares the work.
        monitor: shows progress.
        cache_bytes: memory for states between layers, and as much again at most for the reference's predictions.
        cache_device: where the states are kept; None leaves them on their layers' devices.
        streaming: where the layers come from, if `model` does not hold them; `model` is its source's.

    Raises:
        RunError: numbers of full layers that the model cannot have.
    """
    start = model.config.share_pattern
    if streaming is not None:
        check_streamed(options.scored_by, options.baselines)
    journal = journal or ScoreJournal(None, {})
    monitor = monitor or Monitor()
    outcome = SearchOutcome(start.letters, options.counts(start))
    _check_blocks(options, start)
    begun = time.monotonic()

    def evaluator(name: str, windows: Windows, objective: str, round_size: int | None = None) -> Evaluator:
        if streaming is not None:
            return StreamedEvaluator(
                name,
                streaming.source,
                windows,
                ahead=streaming.ahead,
                cache_bytes=cache_bytes,
                cache_device=cache_device,
                on_sweep=streaming.on_sweep,
                objective=objective,
                teacher=options.teacher,
                batch_size=options.batch_size,
                round_size=round_size,
                journal=journal,
                reference_bytes=cache_bytes,
                on_evaluation=monitor.advance,
            )
        return Evaluator(
            name,
            model,
            windows,
            objective=objective,
            teacher=options.teacher,
            batch_size=options.batch_size,
            round_size=round_size,
            journal=journal,
            cache=PrefixCache(cache_bytes, cache_device),
            reference_bytes=cache_bytes,
            processes=processes,
            on_evaluation=monitor.advance,
        )

    calibrating = evaluator("calibration", calibration, options.scored_by)
    _find_path(calibrating, options, outcome, monitor)
    _refine(calibrating, options, outcome, monitor)
    outcome.teacher = None if options.scored_by == "lm" else calibrating.teacher
    if "similarity" in options.baselines:
        monitor.begin("similarity of attention outputs", 1)
        outcome.baselines["similarity"] = similarity_patterns(output_similarity(calibrating), start.letters)
        monitor.step("done")
    if "uniform" in options.baselines:
        outcome.baselines["uniform"] = _uniform(start)
    checking = evaluator("held_out", held_out, "lm", CHECKED_TOGETHER)
    recalling = checking
    _check(checking, options, outcome, monitor)
    if options.tolerance is not None:
        if retrieval is not None:
            recalling = evaluator(f"retrieval/{retrieval.sha256()[:16]}", retrieval, "lm", CHECKED_TOGETHER)
        guard = _guard(recalling, options, outcome)
        _choose(calibrating, checking, guard, options, outcome, monitor)
        if guard is not None:
            outcome.retrieval = guard.record(retrieval or held_out)
        if recalling is not checking:
            outcome.cost["retrieval_layer_forwards"] = recalling.layer_forwards
    outcome.cost |= {
        "search_layer_forwards": calibrating.layer_forwards,
        "calibration_windows": len(calibrating.windows),
        "held_out_layer_forwards": journal.layer_forwards("held_out"),
        "similarity_layer_forwards": journal.layer_forwards("similarity"),
        "evaluations": journal.count("calibration"),
        "evaluations_resumed": journal.resumed,
        "seconds": round(time.monotonic() - begun, 2),
    }
    if streaming is not None:
        outcome.cost |= streaming.cost(dict.fromkeys((calibrating, checking, recalling)))
    return outcome


def search_identity(
    model: IndexCacheForCausalLM,
    calibration: Windows,
    held_out: Windows,
    options: SearchOptions,
    sha256: str | None = None,
) -> dict[str, Any]:
    """What a journal must agree on to be gone on with: model, data, and the settings that decide the scores.

    `sha256` is that of the model where `model` does not hold its layers.
    """
    return {
        "model_sha256": sha256 or model_sha256(model),
        "calibration_sha256": calibration.sha256(),
        "held_out_sha256": held_out.sha256(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "algorithm": options.algorithm,
        "objective": options.scored_by,
        "teacher": options.teacher,
        "blocks": options.blocks,
        "batch_size": options.batch_size,
        "path_rounds": options.path_rounds,
        "checked_together": CHECKED_TOGETHER,
    }


def recipe(options: SearchOptions) -> dict[str, Any]:
    """The options as JSON values."""
    return {**asdict(options), "objective": options.scored_by}


def _check_blocks(options: SearchOptions, start: SharePattern) -> None:
    if options.scored_by not in OBJECTIVES:
        raise RunError(f"--objective must be one of {', '.join(OBJECTIVES)} (got {options.objective!r})")
    if options.teacher not in TEACHERS:
        raise RunError(f"--teacher must be one of {', '.join(TEACHERS)} (got {options.teacher!r})")
    if not 1 <= options.blocks <= len(start):
        raise RunError(f"--blocks must lie in 1 .. {len(start)}, the number of layers (got {options.blocks})")
    if options.blocks > 1 and options.algorithm != "greedy":
        raise RunError("--blocks belongs to --algorithm greedy")


def _find_path(evaluator: Evaluator, options: SearchOptions, outcome: SearchOutcome, monitor: Monitor) -> None:
    start, last = outcome.start, min(outcome.counts)
    if options.tolerance is not None:
        last = options.blocks
    monitor.begin("search", start.count(FULL) - last)

    def on_step(step: Step) -> None:
        outcome.steps.append(step)
        monitor.step(f"{step.pattern} {step.cost:.4f}")

    if options.algorithm == "greedy":
        greedy(evaluator, start, last, options.blocks, on_step)
    else:
        lazy_greedy(evaluator, start, last, options.path_rounds, on_step)
    outcome.patterns = {start.count(FULL): start}
    outcome.patterns |= {step.pattern.count(FULL): step.pattern for step in outcome.steps}
    outcome.cost["path_layer_forwards"] = evaluator.layer_forwards


def _refine(evaluator: Evaluator, options: SearchOptions, outcome: SearchOutcome, monitor: Monitor) -> None:
    """Refine the patterns asked for, and score them on all calibration windows."""
    monitor.begin("refinement" if options.refines else "calibration loss", len(outcome.counts))
    for count in outcome.counts:
        pattern = outcome.patterns[count]
        found = _refined(evaluator, pattern, options) if count < outcome.start.count(FULL) else None
        found = found or evaluator.evaluate(pattern)
        outcome.patterns[count] = found.pattern
        outcome.calibration[found.pattern] = found
        monitor.step(f"{count} full: {found.pattern} loss {found.loss:.4f}")
    if options.algorithm == "greedy":
        for pattern in outcome.patterns.values():
            outcome.calibration[pattern] = evaluator.evaluate(pattern)


def _refined(evaluator: Evaluator, pattern: str, options: SearchOptions) -> Evaluation | None:
    """The pattern refined, or None where nothing is to be refined."""
    if not options.refines:
        return None
    return refine(evaluator, pattern, options.refine_passes, options.refine_by == "lm")


def _uniform(start: SharePattern) -> dict[int, str]:
    """Evenly spaced patterns, as far as the model has the indexers for them."""
    patterns = {count: SharePattern.uniform(len(start), count) for count in range(1, len(start) + 1)}
    return {
        count: pattern.letters
        for count, pattern in patterns.items()
        if all(start.is_full(layer) for layer in pattern.full_layers)
    }


def _check(evaluator: Evaluator, options: SearchOptions, outcome: SearchOutcome, monitor: Monitor) -> None:
    """Score on the held-out windows."""
    counts = sorted(outcome.patterns, reverse=True) if options.curve else outcome.counts
    wanted = [outcome.start, *(outcome.patterns[count] for count in counts)]
    for patterns in outcome.baselines.values():
        wanted += [patterns[count] for count in counts if count in patterns]
    # Neighbours in this order begin alike, so that they share states.
    wanted = sorted(dict.fromkeys(wanted))
    monitor.begin("held-out checks", len(evaluator.rounds))
    found = evaluator.evaluate_all(
        wanted,
        lambda windows: monitor.step(f"{len(wanted)} patterns on {windows} of {len(evaluator.windows)} windows"),
    )
    outcome.held_out |= {evaluation.pattern: evaluation for evaluation in found}


def _guard(recalling: Evaluator, options: SearchOptions, outcome: SearchOutcome) -> RetrievalGuard | None:
    if not options.least_recall or not recalling.windows.recall_tokens:
        return None

    def recall(pattern: str) -> float:
        found = outcome.held_out.get(pattern) if recalling.name == "held_out" else None
        return (found or recalling.evaluate(pattern)).recall or 0.0

    return RetrievalGuard(recall, outcome.start, options.least_recall)


def _choose(
    calibrating: Evaluator,
    checking: Evaluator,
    guard: RetrievalGuard | None,
    options: SearchOptions,
    outcome: SearchOutcome,
    monitor: Monitor,
) -> None:
    """The fewest full layers within the tolerance; patterns around that number, not refined so far, are refined."""

    def loss(pattern: str) -> float:
        if pattern not in outcome.held_out:
            outcome.held_out[pattern] = checking.evaluate(pattern)
        return outcome.held_out[pattern].loss

    limit = loss(outcome.start) * (1 + options.tolerance)  # type: ignore[operator]

    def is_within(pattern: str) -> bool:
        return loss(pattern) <= limit and (guard is None or guard.allows(pattern, loss(pattern)))

    outcome.chosen = count = next(n for n in sorted(outcome.patterns) if is_within(outcome.patterns[n]))
    monitor.begin("tolerance", 1)
    while count >= max(1, options.blocks) and count < outcome.start.count(FULL):
        refined = None if count in outcome.counts else _refined(calibrating, outcome.patterns[count], options)
        if refined is not None and is_within(refined.pattern):
            outcome.patterns[count] = refined.pattern
            outcome.calibration[refined.pattern] = refined
        if not is_within(outcome.patterns[count]):
            break
        outcome.chosen = count
        count -= 1
    monitor.step(f"{outcome.chosen} full layers within {options.tolerance:.2%}")
