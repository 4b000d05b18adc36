"""Score share patterns on fixed windows: each round of windows once, remembered and journaled.

Windows are run in rounds (a sixteenth of them, then up to an eighth, a quarter, a half, all), so that a pattern that
costs too much is given up after few of them. Where every pattern is wanted on every window, rounds are a few batches
each, so that little has to be kept between layers. Rounds and batches are the same for any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ...configuration.share_pattern import SharePattern
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ...runs.journal import ScoreJournal
from ...runs.processes import Processes
from ...runs.windows.windows import Windows
from .far_context import far_context_weights
from .layer_engine import LayerEngine
from .objective import KL, LOSS, RECALL_HITS, RECALL_LOSS, TokenScorer
from .prefix_cache import PrefixCache

OBJECTIVES = ("kl", "far-kl", "lm")
TEACHERS = ("auto", "dense", "source")


@dataclass(frozen=True)
class Evaluation:
    """What one pattern scores.

    Attributes:
        pattern: its letters.
        costs: the objective summed over the tokens of each window that was run, fp64.
        weight: what those sums are divided by, over all windows: tokens, or their weights.
        complete: all windows were run.
        scores: sums per window, fp64 `[windows run, 4]`, columns as in `objective`.
        tokens: tokens per window.
        recall_tokens: tokens to be recalled in the windows that were run.
        total_windows: how many windows there are.
    """

    pattern: str
    costs: list[float]
    weight: float
    complete: bool
    scores: torch.Tensor
    tokens: int
    recall_tokens: int
    total_windows: int

    @property
    def cost(self) -> float:
        """The objective's mean per token; of windows not run, as if they were like the others."""
        return math.fsum(self.costs) / self.weight * (self.total_windows / len(self.costs))

    @property
    def least_cost(self) -> float:
        """A lower bound of `cost` over all windows: those not run may cost nothing."""
        return math.fsum(self.costs) / self.weight

    @property
    def kl(self) -> float:
        """Mean KL per token to the teacher, in nats; zero when the objective is `lm`."""
        return self._mean(KL, self.tokens * len(self.costs))

    @property
    def loss(self) -> float:
        """Mean language-model loss per token, in nats."""
        return self._mean(LOSS, self.tokens * len(self.costs))

    @property
    def recall(self) -> float | None:
        """Share of the tokens to be recalled that the first choice gets right; None when none is marked."""
        return self._mean(RECALL_HITS, self.recall_tokens) if self.recall_tokens else None

    @property
    def recall_loss(self) -> float | None:
        """Mean loss of those tokens, in nats."""
        return self._mean(RECALL_LOSS, self.recall_tokens) if self.recall_tokens else None

    def _mean(self, column: int, count: int) -> float:
        return math.fsum(self.scores[:, column].tolist()) / count


class Evaluator:
    """Scores patterns on one set of windows.

    Args:
        name: of the set, in the journal (`calibration`, `held_out`).
        model: whose indexers decide which layers may be full.
        windows: the set.
        objective: `kl` (to the teacher's predictions), `far-kl` (the same, tokens that need far context weighing
            more) or `lm` (language-model loss, the paper's).
        teacher: of KL: `dense` (the model with dense attention, which selections approximate), `source` (its own
            pattern), or `auto` for the one with the lower loss on the first round of windows.
        batch_size: windows in one forward.
        round_size: batches in every round; None for rounds that grow.
        cache: where states between layers are kept.
        reference_bytes: memory for the teacher's probabilities.
        journal: where scores are kept.
        processes: who shares the work.
        on_evaluation: called after every round that was run, with its layer-forwards.
    """

    def __init__(
        self,
        name: str,
        model: IndexCacheForCausalLM,
        windows: Windows,
        *,
        objective: str = "kl",
        teacher: str = "source",
        batch_size: int = 1,
        round_size: int | None = None,
        cache: PrefixCache | None = None,
        reference_bytes: int = 2**30,
        journal: ScoreJournal | None = None,
        processes: Processes | None = None,
        on_evaluation: Callable[[int], None] = lambda layer_forwards: None,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)} (got {objective!r})")
        if teacher not in TEACHERS:
            raise ValueError(f"teacher must be one of {', '.join(TEACHERS)} (got {teacher!r})")
        self.name, self.windows, self.objective = name, windows, objective
        self.reference = model.config.share_pattern
        self.batches = [windows.select(slice(i, i + batch_size)) for i in range(0, len(windows), batch_size)]
        self.journal = journal or ScoreJournal(None, {})
        self.processes = processes or Processes()
        self.engine = LayerEngine(
            model,
            [batch.ids[:, :-1] for batch in self.batches],
            PrefixCache(2**30) if cache is None else cache,
            together=round_size,
        )
        self.scorer = TokenScorer(model, self.batches, reference_bytes=reference_bytes)
        self.rounds = _rounds(len(self.batches), round_size)
        # With rounds of a few batches no pattern is the one that the others start like: each is pinned as it runs.
        self._follows = round_size is not None
        self._on_evaluation = on_evaluation
        # Batches that an interrupted run has run the teacher on.
        self._taught_before: set[int] = set()
        dense_is_the_same = windows.seqlen <= (model.config.index_topk or windows.seqlen)
        self._teacher = "source" if objective == "lm" or dense_is_the_same else teacher

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.reference)

    @property
    def layer_forwards(self) -> int:
        """Layers run times windows, over all processes, as if the search had never been interrupted.

        Layers that are run again after an interruption, because their states are gone, are not counted; what a search
        takes depends on the memory for states alone.
        """
        return self.journal.layer_forwards(self.name) + self.journal.layer_forwards(self._teacher_key)

    @property
    def teacher(self) -> str:
        """Whose predictions KL measures the distance to: `dense` or `source`."""
        if self._teacher == "auto":
            dense, source = self._teacher_losses()
            self._teacher = "dense" if dense < source else "source"
        return self._teacher

    def pin(self, pattern: str) -> None:
        """Say which pattern the next ones will start like."""
        self.engine.cache.pin(pattern)

    def expect(self, patterns: dict[str, int]) -> None:
        """Say which patterns may be asked for next, each with how many rounds: of use where layers are streamed."""

    def known(self, pattern: str, rounds: int, by_loss: bool = False) -> tuple[int, Evaluation | None]:
        """What is known of a pattern without running it, where layers are streamed: how many rounds, and them."""
        return 0, None

    def evaluate(
        self,
        pattern: str,
        *,
        stop_above: float = math.inf,
        give_up: Callable[[Evaluation], bool] | None = None,
        rounds: int | None = None,
        by_loss: bool = False,
    ) -> Evaluation:
        """Score a pattern round by round.

        Args:
            pattern: its letters.
            stop_above: leave off once the pattern is certain to cost more than this per token.
            give_up: asked after every round but the last whether to leave off.
            rounds: run so many rounds at most.
            by_loss: take language-model loss for the cost, whatever the objective.
        """
        parts: list[torch.Tensor] = []
        for number in range(len(self.rounds) if rounds is None else min(rounds, len(self.rounds))):
            parts.append(self._round(pattern, number))
            found = self._evaluation(pattern, parts, by_loss)
            if found.complete or found.least_cost > stop_above or (give_up is not None and give_up(found)):
                break
        return found

    def evaluate_all(
        self, patterns: Iterable[str], on_round: Callable[[int], None] = lambda windows: None
    ) -> list[Evaluation]:
        """Score patterns on every window, taking the rounds one after the other: states of a round are kept once.

        Args:
            patterns: their letters; those that begin alike one after the other share the most.
            on_round: called after every round with the windows done so far.
        """
        patterns, windows = list(patterns), 0
        for number, batches in enumerate(self.rounds):
            for pattern in patterns:
                if self._follows:
                    self.pin(pattern)
                self._round(pattern, number)
            windows += sum(len(self.batches[batch]) for batch in batches)
            on_round(windows)
        return [self.evaluate(pattern) for pattern in patterns]

    # ---- one round ----------------------------------------------------------------------------------------------

    def _round(self, pattern: str, number: int) -> torch.Tensor:
        # Every process must take part in the choice, also one that has no batch in this round, at the same point.
        teacher = self.teacher
        batches = self.rounds[number]
        resumed = not self.journal.was_used(self.name, pattern, number)
        known = self.journal.get(self.name, pattern, number)
        if known is not None:
            if resumed:
                self._remember(pattern, batches, teacher)
            return known
        SharePattern.parse(pattern, self.num_layers)
        before = self.engine.layer_forwards
        sizes = [len(self.batches[batch]) for batch in batches]
        table = torch.zeros(sum(sizes), 4, dtype=torch.float64)
        for batch in self.processes.mine(batches):
            self._prepare(batch, teacher)
            first = sum(sizes[: batch - batches.start])
            scores = self.scorer.score(batch, self.engine.last_hidden(pattern, batch))
            table[first : first + len(scores)] = scores
        spent = torch.tensor([self.engine.layer_forwards - before], dtype=torch.float64)
        table = self.processes.gather(table)
        layer_forwards = int(self.processes.gather(spent))
        self.journal.add(self.name, pattern, number, table, layer_forwards)
        self._on_evaluation(layer_forwards)
        return table

    def _prepare(self, batch: int, teacher: str) -> None:
        """Run the teacher on a batch, where the objective needs it."""
        if self.objective == "lm" or self.scorer.has_reference(batch):
            return
        before, is_new = self.engine.layer_forwards, batch not in self._taught_before
        if self.objective == "far-kl":
            hidden = self.engine.last_hidden(self.reference.letters, batch, is_new)
            weights = far_context_weights(self.engine, self.scorer, batch, self.scorer.token_losses(batch, hidden))
            self.scorer.weights[batch] = weights
        self.scorer.set_reference(batch, self._taught(teacher, batch, is_new))
        if not is_new:
            self.engine.layer_forwards = before

    def _taught(self, teacher: str, batch: int, is_new: bool = True) -> torch.Tensor:
        if teacher == "dense":
            return self.engine.dense_hidden(batch)
        return self.engine.last_hidden(self.reference.letters, batch, is_new)

    def _remember(self, pattern: str, batches: range, teacher: str) -> None:
        """Take a round of an interrupted run into account: the states and teachers that it would have left behind."""
        for batch in self.processes.mine(batches):
            if self.objective != "lm" and batch not in self._taught_before:
                self._taught_before.add(batch)
                if self.objective == "far-kl" or teacher == "source":
                    self.engine.remember(self.reference.letters, batch)
            self.engine.remember(pattern, batch)

    @property
    def _teacher_key(self) -> str:
        return f"{self.name} teacher"

    def _teacher_losses(self) -> tuple[float, float]:
        """Losses with dense attention and with the source's pattern, summed over the first round of windows."""
        resumed = not self.journal.was_used(self._teacher_key, self.reference.letters, 0)
        known = self.journal.get(self._teacher_key, self.reference.letters, 0)
        if known is not None and resumed:
            for batch in self.processes.mine(self.rounds[0]):
                self.engine.remember(self.reference.letters, batch)
        if known is None:
            before = self.engine.layer_forwards
            known = torch.zeros(1, 2, dtype=torch.float64)
            for batch in self.processes.mine(self.rounds[0]):
                for column, teacher in enumerate(("dense", "source")):
                    losses = self.scorer.token_losses(batch, self._taught(teacher, batch))
                    known[0, column] += losses.double().sum().cpu()
            spent = torch.tensor([self.engine.layer_forwards - before], dtype=torch.float64)
            known, layer_forwards = self.processes.gather(known), int(self.processes.gather(spent))
            self.journal.add(self._teacher_key, self.reference.letters, 0, known, layer_forwards)
            self._on_evaluation(layer_forwards)
        return float(known[0, 0]), float(known[0, 1])

    def _evaluation(self, pattern: str, parts: list[torch.Tensor], by_loss: bool) -> Evaluation:
        scores = torch.cat(parts)
        seen = self.windows.select(slice(0, len(scores)))
        column = LOSS if by_loss or self.objective == "lm" else KL
        return Evaluation(
            pattern=pattern,
            costs=scores[:, column].tolist(),
            weight=float(len(self.windows) * self.windows.seqlen),
            complete=len(scores) == len(self.windows),
            scores=scores,
            tokens=self.windows.seqlen,
            recall_tokens=seen.recall_tokens,
            total_windows=len(self.windows),
        )


def _rounds(num_batches: int, size: int | None = None) -> list[range]:
    """Batches in rounds that end at a sixteenth of them, an eighth, ... and all, or in rounds of `size`."""
    if size is not None:
        return [range(first, min(first + size, num_batches)) for first in range(0, num_batches, size)]
    ends = sorted({max(1, num_batches // part) for part in (16, 8, 4, 2, 1)})
    return [range(first, last) for first, last in zip([0, *ends[:-1]], ends)]
