"""Hidden states kept between the layers of patterns already run, so that a new pattern starts where it first differs.

The state before layer l depends only on the first l letters of a pattern, and is kept under them.

A search that goes on after an interruption has the results of its first part and not the states. The cache remembers
those by name and size, so that what the search takes is counted as if it had never been interrupted.

Legend: B windows, S tokens, E hidden size, K selected keys.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from ...configuration.share_pattern import SHARED


@dataclass(frozen=True)
class LayerState:
    """What enters a layer.

    Attributes:
        hidden: `[B, S, E]`.
        topk_indices: the selection in force, int32 `[B, S, K]`; None before layer 0 and where every key is selected.
    """

    hidden: torch.Tensor
    topk_indices: torch.Tensor | None

    def to(self, device: torch.device) -> LayerState:
        """The same state on `device`."""
        topk_indices = None if self.topk_indices is None else self.topk_indices.to(device)
        return LayerState(self.hidden.to(device), topk_indices)


@dataclass
class _Selection:
    """A selection in force, which the layers that share it keep once."""

    nbytes: int
    topk_indices: torch.Tensor | None
    users: int = 0


class PrefixCache:
    """States by batch and pattern prefix, within a budget of bytes.

    The least recently used state goes first, those on the path of the pinned pattern last. When the budget is too
    small for one whole path, only every n-th layer is kept, and what lies between is run again.

    Args:
        budget_bytes: what all states together may take; 0 keeps none.
        device: where states are kept; None leaves them where they were made.
    """

    def __init__(self, budget_bytes: int, device: torch.device | None = None) -> None:
        self.budget_bytes, self.used_bytes = budget_bytes, 0
        self.stride = 1
        self._device = device
        self._pinned = ""
        # Bytes of the hidden states of everything that is kept or remembered, in the order of use.
        self._hidden_bytes: OrderedDict[tuple[int, str], int] = OrderedDict()
        self._states: dict[tuple[int, str], LayerState] = {}
        self._selections: dict[tuple[int, str], _Selection] = {}

    def pin(self, letters: str) -> None:
        """States on the path of this pattern are the last to go."""
        self._pinned = letters

    def fit_stride(self, state_bytes: int, num_layers: int, num_batches: int) -> None:
        """Choose which layers to keep so that one path over all batches fits."""
        path = state_bytes * num_layers * num_batches
        self.stride = max(1, -(-path // max(1, self.budget_bytes)))

    def depth(self, batch: int, letters: str) -> int | None:
        """The layer that the deepest state on the path of `letters` enters, here or remembered; a use of it."""
        for layer in range(len(letters) - 1, -1, -1):
            key = (batch, letters[:layer])
            if key in self._hidden_bytes:
                self._hidden_bytes.move_to_end(key)
                return layer
        return None

    def longest(self, batch: int, letters: str) -> tuple[int, LayerState] | None:
        """The deepest state on the path of `letters` that is here: the layer it enters, and the state."""
        for layer in range(len(letters) - 1, -1, -1):
            if (batch, letters[:layer]) in self._states:
                return layer, self._states[batch, letters[:layer]]
        return None

    def keep(self, batch: int, prefix: str, state: LayerState) -> None:
        """Keep the state that enters layer `len(prefix)`, if there is room for it."""
        selected = 0 if state.topk_indices is None else state.topk_indices.nbytes
        self.remember(batch, prefix, state.hidden.nbytes, selected)
        self.refill(batch, prefix, state)

    def remember(self, batch: int, prefix: str, hidden_bytes: int, selection_bytes: int) -> None:
        """Take a state of this size into account as `keep` does, without having it."""
        key, size = (batch, prefix), hidden_bytes + selection_bytes
        if len(prefix) % self.stride or key in self._hidden_bytes or size > self.budget_bytes:
            return
        while self.used_bytes + size > self.budget_bytes:
            victim = next((known for known in self._hidden_bytes if not self._is_pinned(known[1])), None)
            if victim is None:
                if not self._is_pinned(prefix):
                    return
                victim = next(iter(self._hidden_bytes))
            self._drop(victim)
        self._hidden_bytes[key] = hidden_bytes
        self.used_bytes += hidden_bytes
        if selection_bytes:
            selection = self._selections.setdefault(_selector(key), _Selection(selection_bytes, None))
            self.used_bytes += selection.nbytes * (selection.users == 0)
            selection.users += 1

    def refill(self, batch: int, prefix: str, state: LayerState) -> None:
        """Keep a state that is remembered and not here; nothing else."""
        key = (batch, prefix)
        if key not in self._hidden_bytes or key in self._states:
            return
        if self._device is not None:
            state = state.to(self._device)
        selection = self._selections.get(_selector(key))
        if selection is not None:
            # One tensor for all layers that share the selection, also when it was made twice.
            if selection.topk_indices is None:
                selection.topk_indices = state.topk_indices
            state = LayerState(state.hidden, selection.topk_indices)
        self._states[key] = state

    def _is_pinned(self, prefix: str) -> bool:
        return self._pinned.startswith(prefix)

    def _drop(self, key: tuple[int, str]) -> None:
        self._states.pop(key, None)
        self.used_bytes -= self._hidden_bytes.pop(key)
        selection = self._selections.get(_selector(key))
        if selection is not None:
            selection.users -= 1
            if selection.users == 0:
                self.used_bytes -= self._selections.pop(_selector(key)).nbytes


def _selector(key: tuple[int, str]) -> tuple[int, str]:
    """What names the selection in force under a prefix: the prefix up to the full layer that made it."""
    return key[0], key[1].rstrip(SHARED)
