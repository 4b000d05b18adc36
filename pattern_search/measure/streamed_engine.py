"""`LayerEngine` for models larger than memory: what is expected next passes the layers together, in one sweep.

The search asks for one pattern on one batch of windows after the other, and decides by what it gets. Here it says
beforehand what it will ask for, as far as it can tell; what is asked for and is not there starts a sweep that takes
along what is expected. Patterns that begin alike share what they begin with. What a sweep ran and nobody asks for is
forgotten: results, and the layer-forwards that are counted, are those of the search with the model in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from ...configuration.share_pattern import FULL, SHARED
from ...modeling_indexcache.forward_plan import ForwardPlan
from ...modeling_indexcache.selection import Selection
from ...runs.errors import RunError
from ...runs.streaming.layer_source import LayerSource
from .layer_engine import LayerEngine
from .prefix_cache import LayerState, PrefixCache

Key = tuple[int, str]


class StreamedEngine(LayerEngine):
    """A layer source's model, run pattern by pattern over fixed batches of windows.

    Args:
        source: of the layers.
        batches: token ids, each `[B, S]`.
        cache: counts what the model in memory would keep and run; no state is put there.
        together: as for `LayerEngine`.
        room: bytes for states: half for those that pass the layers together, half for those between the layers of
            the pattern that the next ones start like.
        states_on: where states are kept; None leaves them on the source's device.

    Attributes:
        layers_run: layers run so far, times windows, those that nobody asked for included.
    """

    looks_ahead = True

    def __init__(
        self,
        source: LayerSource,
        batches: list[torch.Tensor],
        cache: PrefixCache,
        together: int | None = None,
        room: int = 2**31,
        states_on: torch.device | None = None,
    ) -> None:
        super().__init__(source.model, batches, cache, together)
        self._source, self._room, self._states_on = source, room // 2, states_on
        self._kept = PrefixCache(room // 2, states_on)
        self._own = source.model.config.share_pattern.letters
        self._expected: dict[Key, None] = {}
        self._found: dict[Key, torch.Tensor] = {}
        self.layers_run = 0

    def expect(self, jobs: Iterable[tuple[str, int]]) -> None:
        """Say what will be asked for next, patterns' letters and numbers of batches, in place of what was said."""
        self._expected = dict.fromkeys((batch, letters) for letters, batch in jobs)
        self._found = {key: hidden for key, hidden in self._found.items() if key in self._expected}

    @property
    def dense_letters(self) -> str:
        """What `dense_hidden` runs."""
        return SHARED * self.num_layers

    def pin(self, letters: str) -> None:
        """See `LayerEngine`."""
        super().pin(letters)
        self._kept.pin(letters)

    @torch.inference_mode()
    def last_hidden(self, letters: str, batch: int, counted: bool = True) -> torch.Tensor:
        """See `LayerEngine`."""
        if counted:
            self._size_cache(batch)
            known = self.cache.depth(batch, letters)
            self.layer_forwards += self.batches[batch].shape[0] * (self.num_layers - (known or 0))
            self.remember(letters, batch)
        return self._take(letters, batch)

    @torch.inference_mode()
    def dense_hidden(self, batch: int) -> torch.Tensor:
        """See `LayerEngine`."""
        self.layer_forwards += self.batches[batch].shape[0] * self.num_layers
        return self._take(self.dense_letters, batch)

    def last_hidden_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Not here: every chunk of every window would be a sweep.

        Raises:
            RunError: always.
        """
        raise RunError("--objective far-kl cannot be streamed: take kl or lm, or run without --stream")

    # ---- sweeps -------------------------------------------------------------------------------------------------

    def _take(self, letters: str, batch: int) -> torch.Tensor:
        key = batch, letters
        if key not in self._found:
            self._sweep(key)
        # The teacher is asked for again as the start; what `expect` does not name any more goes there.
        hidden = self._found[key]
        if key not in self._expected or letters not in (self._own, self.dense_letters):
            del self._found[key]
            self._expected.pop(key, None)
        return self.model.model.norm(hidden.to(self._source.device))

    def _sweep(self, first: Key) -> None:
        """Run a pattern on a batch, and those expected that there is room for beside it."""
        self._kept.fit_stride(sum(self._state_bytes(first[0])), self.num_layers, self._together)
        jobs, room = [first], self._room - 2 * sum(self._state_bytes(first[0]))
        for key in self._expected:
            # A state, and the one behind the layer beside it while it is made.
            room -= 2 * sum(self._state_bytes(key[0])) * (key not in self._found and key != first)
            if room < 0:
                break
            if key not in self._found and key != first:
                jobs.append(key)
        entering: dict[int, dict[Key, LayerState]] = {}
        starts: dict[Key, int] = {}
        for batch, letters in jobs:
            known = self._kept.longest(batch, letters)
            starts[batch, letters], state = known or (0, None)
            where = entering.setdefault(starts[batch, letters], {})
            key = batch, letters[: starts[batch, letters]]
            if key not in where:
                where[key] = state or self._embed(self.batches[batch])
        states: dict[Key, LayerState] = {}
        for layer in self._source.sweep(range(min(starts.values()), self.num_layers)):
            states |= entering.pop(layer, {})
            passing = [job for job in jobs if starts[job] <= layer]
            states = self._one_layer(states, {(batch, letters[: layer + 1]) for batch, letters in passing}, layer)
        for key in jobs:
            self._found[key] = states[key].hidden

    def _one_layer(self, states: dict[Key, LayerState], wanted: set[Key], layer: int) -> dict[Key, LayerState]:
        """The states behind a layer; those before it go as soon as nothing needs them."""
        found: dict[Key, LayerState] = {}
        for batch, prefix in list(states):
            state = states.pop((batch, prefix))
            for letter in (FULL, SHARED):
                key = batch, prefix + letter
                if key not in wanted:
                    continue
                behind = self._step(state, prefix + letter, layer)
                self.layers_run += self.batches[batch].shape[0]
                if layer + 1 < self.num_layers and self._kept.is_pinned(key[1]) and FULL in key[1]:
                    self._kept.keep(*key, behind)
                found[key] = behind if self._states_on is None else behind.to(self._states_on)
        return found

    def _step(self, state: LayerState, prefix: str, layer: int) -> LayerState:
        """One layer, as `_run` does it."""
        decoder, state = self.model.model, state.to(self._source.device)
        letters = prefix + SHARED * (self.num_layers - len(prefix))
        plan = replace(ForwardPlan.of(decoder, state.hidden, keeps_states=True), letters=letters)
        hidden, selection, _ = plan.run(decoder, state.hidden, Selection(state.topk_indices), layer, layer + 1)
        return LayerState(hidden, None if selection.listed is None else selection.indices())
