"""Hidden states kept between the layers of patterns already run, so that a new pattern starts where it first differs.

The state before layer l depends only on the first l letters of a pattern, and is kept under them.

Legend: B windows, S tokens, E hidden size, K selected keys.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch


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
        self._states: OrderedDict[tuple[int, str], LayerState] = OrderedDict()
        # Layers that share a selection keep one tensor: it is counted once.
        self._selection_users: dict[int, int] = {}

    def pin(self, letters: str) -> None:
        """States on the path of this pattern are the last to go."""
        self._pinned = letters

    def fit_stride(self, state_bytes: int, num_layers: int, num_batches: int) -> None:
        """Choose which layers to keep so that one path over all batches fits."""
        path = state_bytes * num_layers * num_batches
        self.stride = max(1, -(-path // max(1, self.budget_bytes)))

    def longest(self, batch: int, letters: str) -> tuple[int, LayerState] | None:
        """The deepest state on the path of `letters`: the layer it enters, and the state."""
        for layer in range(len(letters) - 1, -1, -1):
            key = (batch, letters[:layer])
            if key in self._states:
                self._states.move_to_end(key)
                return layer, self._states[key]
        return None

    def keep(self, batch: int, prefix: str, state: LayerState) -> None:
        """Keep the state that enters layer `len(prefix)`, if there is room for it."""
        key = (batch, prefix)
        size = state.hidden.nbytes + (0 if state.topk_indices is None else state.topk_indices.nbytes)
        if len(prefix) % self.stride or key in self._states or size > self.budget_bytes:
            return
        while self.used_bytes + size > self.budget_bytes:
            victim = next((known for known in self._states if not self._is_pinned(known[1])), None)
            if victim is None:
                if not self._is_pinned(prefix):
                    return
                victim = next(iter(self._states))
            self._drop(victim)
        if self._device is not None:
            state = state.to(self._device)
        self._states[key] = state
        self.used_bytes += state.hidden.nbytes + self._count_selection(state.topk_indices, 1)

    def _is_pinned(self, prefix: str) -> bool:
        return self._pinned.startswith(prefix)

    def _drop(self, key: tuple[int, str]) -> None:
        state = self._states.pop(key)
        self.used_bytes -= state.hidden.nbytes + self._count_selection(state.topk_indices, -1)

    def _count_selection(self, topk_indices: torch.Tensor | None, change: int) -> int:
        """Bytes that one user more or less of a selection adds or frees."""
        if topk_indices is None:
            return 0
        users = self._selection_users.get(id(topk_indices), 0) + change
        self._selection_users[id(topk_indices)] = users
        if users == 0:
            del self._selection_users[id(topk_indices)]
        return topk_indices.nbytes if users == max(0, change) else 0
