"""Score share patterns while layers stream: what is asked for and what is likely asked next share a sweep.

The search asks as ever, one round of one pattern at a time, and gets the same numbers. A round that is not known costs
a sweep through the layers, and this sweep takes along what the search has said it may ask for. Layer-forwards are
counted as a search with the model resident takes them; what the sweeps really ran is `Sweeper.layer_forwards`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ...configuration.share_pattern import SHARED, SharePattern
from ...evaluation.perplexity import check_loss
from ...modeling_indexcache.selection import Selection
from ...runs.journal import ScoreJournal
from ...runs.streaming.layer_source import LayerSource
from ...runs.streaming.sweep import Pass, Passing, Sweeper
from ...runs.windows.windows import Windows
from .evaluator import Evaluation, Evaluator
from .objective import LOSS
from .prefix_cache import LayerState, PrefixCache


class StreamedEvaluator(Evaluator):
    """As `Evaluator`, of a checkpoint whose layers are not all in memory.

    Args:
        name: of the set of windows.
        source: the layers.
        windows: the set.
        ahead: where scores go that were made before they were asked for, so that an interruption loses no sweep.
        cache_bytes: for states: half of it for those kept between sweeps, half for those under way in one, of which
            a sweep takes along as many as fit.
        cache_device: where states are; None for the layers' device.
        on_sweep: called after every sweep with the number of passes that it took.
        **arguments: of `Evaluator`, but for `cache` and `processes`.

    Raises:
        ValueError: the objective `far-kl`, which runs windows in parts.
    """

    def __init__(
        self,
        name: str,
        source: LayerSource,
        windows: Windows,
        *,
        ahead: ScoreJournal | None = None,
        cache_bytes: int = 2**30,
        cache_device: torch.device | None = None,
        on_sweep: Callable[[int], None] = lambda passes: None,
        **arguments: Any,
    ) -> None:
        super().__init__(name, source.model, windows, cache=PrefixCache(cache_bytes), **arguments)
        if self.objective == "far-kl":
            raise ValueError("far-kl runs windows in parts and is not streamed: use kl or lm")
        self._sweeper = Sweeper(source, self.engine.batches, keeps_states=True, held_on=cache_device)
        self._states = PrefixCache(cache_bytes // 2, cache_device)
        self._states.fit_stride(sum(self.engine._state_bytes(0)), self.num_layers, self.engine._together)
        self._room = cache_bytes // 2
        self._ahead = ahead or ScoreJournal(None, {})
        self._on_sweep = on_sweep
        self._likely: dict[str, int] = {}
        self._certain: tuple[str, int] = ("", 0)
        # Batches whose teacher is counted; the teachers' hidden states by batch and letters, until they are needed.
        self._counted: set[int] = set()
        self._teachers: dict[Pass, torch.Tensor] = {}

    @property
    def streamed_layer_forwards(self) -> int:
        """What this process ran: with passes that nobody asked for, and again after an interruption."""
        return self._sweeper.layer_forwards

    def pin(self, pattern: str) -> None:
        """See `Evaluator`."""
        super().pin(pattern)
        self._states.pin(pattern)

    def expect(self, patterns: dict[str, int]) -> None:
        """See `Evaluator`."""
        self._likely = patterns

    def known(self, pattern: str, rounds: int, by_loss: bool = False) -> tuple[int, Evaluation | None]:
        """See `Evaluator`."""
        parts: list[torch.Tensor] = []
        for number in range(rounds):
            part = self._known(pattern, number)
            if part is None:
                break
            parts.append(part)
        return len(parts), self._evaluation(pattern, parts, by_loss) if parts else None

    def evaluate(
        self,
        pattern: str,
        *,
        stop_above: float = math.inf,
        give_up: Callable[[Evaluation], bool] | None = None,
        rounds: int | None = None,
        by_loss: bool = False,
    ) -> Evaluation:
        """See `Evaluator`."""
        is_certain = give_up is None and stop_above == math.inf
        self._certain = (pattern, min(rounds or len(self.rounds), len(self.rounds)) if is_certain else 0)
        return super().evaluate(pattern, stop_above=stop_above, give_up=give_up, rounds=rounds, by_loss=by_loss)

    def evaluate_all(
        self, patterns: Iterable[str], on_round: Callable[[int], None] = lambda windows: None
    ) -> list[Evaluation]:
        """See `Evaluator`."""
        patterns = list(patterns)
        self._certain = ("", 0)
        self.expect(dict.fromkeys(patterns, len(self.rounds)))
        found = super().evaluate_all(patterns, on_round)
        self.expect({})
        return found

    # ---- one round ----------------------------------------------------------------------------------------------

    def _round(self, pattern: str, number: int) -> torch.Tensor:
        teacher, batches = self.teacher, self.rounds[number]
        resumed = not self.journal.was_used(self.name, pattern, number)
        known = self.journal.get(self.name, pattern, number)
        if known is not None:
            if resumed:
                self._remember(pattern, batches, teacher)
            return known
        SharePattern.parse(pattern, self.num_layers)
        if self._ahead.get(self.name, pattern, number) is None:
            self._sweep(pattern, number, teacher)
        table = self._ahead.get(self.name, pattern, number)
        assert table is not None
        layer_forwards = sum(self._count(pattern, batch, teacher) for batch in batches)
        self.journal.add(self.name, pattern, number, table, layer_forwards)
        self._on_evaluation(layer_forwards)
        return table

    def _known(self, pattern: str, number: int) -> torch.Tensor | None:
        """Scores of a round that no sweep is needed for; not a use of them."""
        for journal in (self.journal, self._ahead):
            found = journal.peek(self.name, pattern, number)
            if found is not None:
                return found
        return None

    def _count(self, pattern: str, batch: int, teacher: str) -> int:
        """The layer-forwards that a resident search takes for a batch at this point, with what it keeps of it."""
        forwards = 0
        if self.objective != "lm" and batch not in self._counted:
            self._counted.add(batch)
            if batch not in self._taught_before:
                forwards += self._count_teacher(teacher, batch)
        return forwards + self._count_pass(pattern, batch)

    def _count_teacher(self, teacher: str, batch: int) -> int:
        if teacher == "dense":
            return len(self.batches[batch]) * self.num_layers
        return self._count_pass(self.reference.letters, batch)

    def _count_pass(self, letters: str, batch: int) -> int:
        self.engine._size_cache(batch)
        depth = self.engine.cache.depth(batch, letters)
        self.engine.remember(letters, batch)
        return len(self.batches[batch]) * (self.num_layers - (depth or 0))

    # ---- sweeps -------------------------------------------------------------------------------------------------

    def _sweep(self, pattern: str, number: int, teacher: str) -> None:
        """Score a round of a pattern, and what else is likely to be asked for."""
        wanted = {(pattern, number): None}
        likely = [(self._certain[0], one) for one in range(self._certain[1])]
        likely += sorted(
            ((other, one) for other, rounds in self._likely.items() for one in range(rounds)), key=lambda item: item[1]
        )
        bytes_of = [sum(self.engine._state_bytes(batch)) for batch in range(len(self.batches))]
        room = self._room - sum(bytes_of[batch] for batch in self.rounds[number])
        for item in likely:
            size = sum(bytes_of[batch] for batch in self.rounds[item[1]])
            if item in wanted or self._known(*item) is not None:
                continue
            if size > room:
                break
            room -= size
            wanted[item] = None
        letters = self._teacher_letters(teacher)
        batches = dict.fromkeys(batch for _, one in wanted for batch in self.rounds[one])
        untaught = [b for b in batches if self.objective != "lm" and not self.scorer.has_reference(b)]
        for batch in [b for b in untaught if (b, letters) in self._teachers]:
            self.scorer.set_reference(batch, self._teachers.pop((batch, letters)).to(self._sweeper.source.device))
            untaught.remove(batch)
        passes = [(batch, letters) for batch in untaught]
        passes += [(batch, other) for other, one in wanted for batch in self.rounds[one]]
        tables: dict[Pass, torch.Tensor] = {}
        asked = {(batch, other) for other, one in wanted for batch in self.rounds[one]}
        for (batch, other), hidden in self._run(passes):
            if other == letters and batch in untaught:
                self.scorer.set_reference(batch, hidden)
            if (batch, other) in asked:
                scores = self.scorer.score(batch, hidden)
                self._check(float(scores[:, LOSS].mean()) / self.windows.seqlen)
                tables[batch, other] = scores
        for other, one in wanted:
            scores = torch.cat([tables[batch, other] for batch in self.rounds[one]])
            self._ahead.add(self.name, other, one, scores, 0)

    def _check(self, loss: float) -> None:
        """Every comparison with a loss that is no number would be settled by chance."""
        check_loss(loss, self._sweeper.source.location, self.engine.model)

    def _teacher_losses(self) -> tuple[float, float]:
        reference = self.reference.letters
        resumed = not self.journal.was_used(self._teacher_key, reference, 0)
        known = self.journal.get(self._teacher_key, reference, 0)
        if known is not None and resumed:
            for batch in self.rounds[0]:
                self.engine.remember(reference, batch)
        if known is None:
            known, layer_forwards = torch.zeros(1, 2, dtype=torch.float64), 0
            names = {self._teacher_letters(teacher): column for column, teacher in enumerate(("dense", "source"))}
            for (batch, letters), hidden in self._run([(b, each) for b in self.rounds[0] for each in names]):
                losses = self.scorer.token_losses(batch, hidden)
                self._check(float(losses.double().mean()))
                known[0, names[letters]] += losses.double().sum().cpu()
                self._teachers[batch, letters] = hidden.to(self._sweeper._held_on or hidden.device)
            for batch in self.rounds[0]:
                layer_forwards += sum(self._count_teacher(teacher, batch) for teacher in ("dense", "source"))
            self.journal.add(self._teacher_key, reference, 0, known, layer_forwards)
            self._on_evaluation(layer_forwards)
        return float(known[0, 0]), float(known[0, 1])

    def _teacher_letters(self, teacher: str) -> str:
        return SHARED * self.num_layers if teacher == "dense" else self.reference.letters

    def _run(self, passes: list[Pass]) -> Iterable[tuple[Pass, torch.Tensor]]:
        def known(batch: int, letters: str) -> tuple[int, Passing] | None:
            self._states.depth(batch, letters)
            found = self._states.longest(batch, letters)
            return None if found is None else (found[0], Passing(found[1].hidden, Selection(found[1].topk_indices)))

        def keep(batch: int, prefix: str, state: Passing) -> None:
            listed = None if state.selection.listed is None else state.selection.indices()
            self._states.keep(batch, prefix, LayerState(state.hidden, listed))

        yield from self._sweeper.run(passes, known, keep)
        self._on_sweep(len(passes))
