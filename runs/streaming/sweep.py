"""Move many passes through a checkpoint's layers at once: each layer is read once for all of them.

Passes over the same windows that begin with the same letters are one pass until they part.

Legend: B windows, S tokens, E hidden size, K selected keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ...configuration.share_pattern import SHARED
from ...modeling_indexcache.forward_plan import ForwardPlan
from ...modeling_indexcache.selection import Selection
from .layer_source import LayerSource

#: Number of a batch, and the letters of a pattern or of its beginning.
Pass = tuple[int, str]


@dataclass(frozen=True)
class Passing:
    """What enters a layer: hidden states `[B, S, E]`, and the selection in force."""

    hidden: torch.Tensor
    selection: Selection

    def to(self, device: torch.device | None) -> Passing:
        """The same on `device`; itself where that is None. On the host of a GPU it lies in pinned memory."""
        if device is None:
            return self
        listed = self.selection.listed
        if not isinstance(listed, torch.Tensor):
            return Passing(_on(self.hidden, device), self.selection.to(device))
        return Passing(_on(self.hidden, device), self.selection._replace(listed=_on(listed, device)))


class Sweeper:
    """Runs passes breadth first: all of them go through a layer before the next one is there.

    Args:
        source: the layers.
        batches: token ids, each `[B, S]`.
        keeps_states: states are kept by `on_state`; layers then leave their inputs alone, as the engine of a search
            wants it. Otherwise layers run as in a forward of the whole model.
        held_on: where states wait for their layer; None for the device.
    """

    def __init__(
        self,
        source: LayerSource,
        batches: Sequence[torch.Tensor],
        *,
        keeps_states: bool = False,
        held_on: torch.device | None = None,
    ) -> None:
        self.source, self.batches = source, batches
        self._keeps_states, self._held_on = keeps_states, held_on
        #: Layers run so far, times the windows they ran over.
        self.layer_forwards = 0

    @torch.inference_mode()
    def run(
        self,
        passes: Sequence[Pass],
        known: Callable[[int, str], tuple[int, Passing] | None] = lambda batch, letters: None,
        on_state: Callable[[int, str, Passing], None] = lambda batch, prefix, state: None,
    ) -> Iterator[tuple[Pass, torch.Tensor]]:
        """Run passes through one sweep, and give the normed hidden states `[B, S, E]` behind the last layer of each.

        Args:
            passes: batches with whole patterns; twice the same counts once.
            known: the deepest state of a pass that is there: the layer that it enters, and the state.
            on_state: told of every new state that enters a layer under a prefix.
        """
        passes = list(dict.fromkeys(passes))
        if not passes:
            return
        waiting: dict[Pass, Passing] = {}
        needed: set[Pass] = set()
        for batch, letters in passes:
            found = known(batch, letters)
            if found is None:
                if (batch, "") not in waiting:
                    waiting[batch, ""] = self._embedded(batch).to(self._held_on)
                    on_state(batch, "", waiting[batch, ""])
                layer = 0
            else:
                layer = found[0]
                waiting.setdefault((batch, letters[:layer]), found[1])
            needed |= {(batch, letters[:end]) for end in range(layer + 1, len(letters) + 1)}
        for layer in self.source.layers(min(map(len, (prefix for _, prefix in waiting)), default=0)):
            for entering in [one for one in waiting if len(one[1]) == layer]:
                batch, prefix = entering
                state = waiting.pop(entering).to(self.source.device)
                ways = [prefix + letter for letter in "FS" if (batch, prefix + letter) in needed]
                for place, way in enumerate(ways):
                    # A layer may overwrite what enters it.
                    is_last = self._keeps_states or place + 1 == len(ways)
                    given = state if is_last else replace(state, hidden=state.hidden.clone())
                    reached = self._through(layer, way, given).to(self._held_on)
                    self.layer_forwards += reached.hidden.shape[0]
                    waiting[batch, way] = reached
                    if layer + 1 < self.source.num_layers:
                        on_state(batch, way, reached)
                    del given, reached
                del state
        norm = self.source.model.model.norm
        for one in passes:
            yield one, norm(waiting.pop(one).hidden.to(self.source.device))

    def _embedded(self, batch: int) -> Passing:
        ids = self.batches[batch].to(self.source.device, torch.long)
        return Passing(self.source.model.model.embed_tokens(ids), Selection())

    def _through(self, layer: int, way: str, state: Passing) -> Passing:
        decoder = self.source.model.model
        plan = ForwardPlan.of(decoder, state.hidden, keeps_states=self._keeps_states)
        plan = replace(plan, letters=way.ljust(self.source.num_layers, SHARED))
        hidden, selection, _ = plan.run(decoder, state.hidden, state.selection, layer, layer + 1)
        return Passing(hidden, selection)


def _on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; through pinned memory the bus is several times as fast as otherwise."""
    if tensor.is_cuda and device.type == "cpu":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    # Pinned memory that is let go is taken anew when its copies are done.
    return tensor.to(device, non_blocking=device.type == "cuda")
