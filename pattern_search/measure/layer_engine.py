"""Run the layers of a model under any share pattern, starting from the deepest state that is already known.

The only place that runs and counts layers: one layer over one window is one layer-forward.

Legend: B windows, S tokens, E hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch

from ...configuration.share_pattern import SHARED
from ...modeling_indexcache.forward_plan import ForwardPlan
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ...modeling_indexcache.selection import Selection
from .prefix_cache import LayerState, PrefixCache


class LayerEngine:
    """A model's layers, run pattern by pattern over fixed batches of windows.

    Layers are called as `IndexCacheModel.forward` calls them, so that a model spread over devices by a device map or
    by tensor parallelism runs as it always does.

    Args:
        model: in evaluation mode; its indexers decide which layers may be full.
        batches: token ids, each `[B, S]`.
        cache: where states between layers are kept.
        together: batches that patterns are run on before they are run on others, which decides how many layers'
            states there is room for; all when None.
    """

    def __init__(
        self,
        model: IndexCacheForCausalLM,
        batches: list[torch.Tensor],
        cache: PrefixCache,
        together: int | None = None,
    ) -> None:
        self.model, self.batches, self.cache = model.eval(), batches, cache
        self._together = min(together or len(batches), len(batches))
        self.num_layers: int = model.config.num_hidden_layers
        #: Layers run so far, times the windows they ran over.
        self.layer_forwards = 0
        self._sized = False

    @torch.inference_mode()
    def last_hidden(self, letters: str, batch: int, counted: bool = True) -> torch.Tensor:
        """The normed hidden states `[B, S, E]` after the last layer of batch number `batch` under `letters`.

        Args:
            letters: the pattern.
            batch: its number.
            counted: False: an interrupted run has run this at its time, and it is neither counted nor newly kept.
        """
        ids = self.batches[batch]
        self._size_cache(batch)
        # Layers before this one were run by an interrupted run, or are here.
        known = self.cache.depth(batch, letters) if counted else self.num_layers
        found = self.cache.longest(batch, letters)
        if found is None:
            layer, state = 0, self._embed(ids)
            self._enter(batch, "", state, known is None)
        else:
            layer, state = found[0], found[1].to(self._input_device)
        for behind, reached in enumerate(self._run(state, letters, layer), start=layer + 1):
            is_new = behind > (known or 0)
            self.layer_forwards += ids.shape[0] * is_new
            if behind < self.num_layers:
                self._enter(batch, letters[:behind], reached, is_new)
        return self.model.model.norm(reached.hidden)

    def remember(self, letters: str, batch: int) -> None:
        """Take `last_hidden(letters, batch)` of an interrupted run into account: what it would have left behind."""
        self._size_cache(batch)
        hidden_bytes, selection_bytes = self._state_bytes(batch)
        known = self.cache.depth(batch, letters)
        for layer in range(0 if known is None else known + 1, self.num_layers):
            self.cache.remember(batch, letters[:layer], hidden_bytes, selection_bytes if layer else 0)

    def _enter(self, batch: int, prefix: str, state: LayerState, is_new: bool) -> None:
        """Keep the state that enters layer `len(prefix)`: a new one, or one that is remembered alone."""
        (self.cache.keep if is_new else self.cache.refill)(batch, prefix, state)

    @torch.inference_mode()
    def dense_hidden(self, batch: int) -> torch.Tensor:
        """As `last_hidden` with dense attention in every layer; nothing is cached, a layer counts as any other."""
        ids = self.batches[batch]
        self.layer_forwards += ids.shape[0] * self.num_layers
        # A shared layer with no full layer before it reads everything.
        return self._all_layers(ids, SHARED * self.num_layers)

    @torch.inference_mode()
    def last_hidden_of(self, ids: torch.Tensor) -> torch.Tensor:
        """The same for other tokens `[B, S]`, all layers full, nothing cached and nothing counted."""
        return self._all_layers(ids, self.model.config.share_pattern.letters)

    def _all_layers(self, ids: torch.Tensor, letters: str) -> torch.Tensor:
        (last,) = deque(self._run(self._embed(ids), letters, 0), maxlen=1)
        return self.model.model.norm(last.hidden)

    def _embed(self, ids: torch.Tensor) -> LayerState:
        return LayerState(self.model.model.embed_tokens(ids.to(self._input_device)), None)

    def _run(self, state: LayerState, letters: str, first: int) -> Iterator[LayerState]:
        """The states behind layers `first` and up."""
        decoder, selection = self.model.model, Selection(state.topk_indices)
        plan = replace(ForwardPlan.of(decoder, state.hidden, keeps_states=True), letters=letters)
        for layer in range(first, self.num_layers):
            hidden, selection, _ = plan.run(decoder, state.hidden, selection, layer, layer + 1)
            state = LayerState(hidden, None if selection.listed is None else selection.indices())
            yield state

    @property
    def _input_device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _state_bytes(self, batch: int) -> tuple[int, int]:
        """Bytes of a state's hidden values and of its selection, where one is made."""
        tokens, config = self.batches[batch].numel(), self.model.config
        topk = config.index_topk or 0
        hidden = tokens * config.hidden_size * self.model.get_input_embeddings().weight.element_size()
        return hidden, 4 * tokens * topk * (self.batches[batch].shape[1] > topk)

    def _size_cache(self, batch: int) -> None:
        """Fit the cache to the model, from the first batch that is run."""
        if self._sized:
            return
        self.cache.fit_stride(sum(self._state_bytes(batch)), self.num_layers, self._together)
        self._sized = True
