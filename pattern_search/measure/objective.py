"""What a pattern costs on a batch of windows: KL to a teacher's predictions, and language-model loss.

Both are sums over tokens of numbers that are never negative, window by window: what a pattern has cost on some
windows is a lower bound of what it costs on all of them.

Legend: B windows, S tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ...runs.windows.windows import Windows

# Columns of a table of scores: sums over the tokens of a window.
KL, LOSS, RECALL_LOSS, RECALL_HITS = range(4)
NUM_SCORES = 4

# Largest block of fp32 logits in bytes.
LOGITS_BLOCK_BYTES = 64 * 2**20


class TokenScorer:
    """Scores last hidden states against the next tokens and, once it has a reference, against its predictions.

    Args:
        model: whose head makes the logits.
        batches: the windows of each batch.
        reference_bytes: the teacher's probabilities are kept as long as they fit in so many bytes, made anew
            from its hidden states otherwise.
    """

    def __init__(
        self,
        model: IndexCacheForCausalLM,
        batches: list[Windows],
        reference_bytes: int = 0,
    ) -> None:
        #: What the KL of each token counts, fp32 `[B, S]` by batch; 1 for batches that are not in it.
        self.weights: dict[int, torch.Tensor] = {}
        self._head = model.get_output_embeddings()
        self._batches = batches
        self._room = reference_bytes
        self._hidden: dict[int, torch.Tensor] = {}
        self._probabilities: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def has_reference(self, batch: int) -> bool:
        """Whether KL can be scored on this batch."""
        return batch in self._hidden

    @torch.inference_mode()
    def set_reference(self, batch: int, hidden: torch.Tensor) -> None:
        """Take `hidden [B, S, E]`, normed, as the predictions that KL measures the distance from."""
        self._hidden[batch] = hidden
        needed = hidden.shape[0] * hidden.shape[1] * self._vocabulary * 4
        if needed <= self._room:
            self._room -= needed
            self._probabilities[batch] = list(self._make_reference(batch))

    @torch.inference_mode()
    def score(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens of each window: fp64 `[B, 4]` on the CPU.

        Args:
            batch: its number.
            hidden: `[B, S, E]`, normed.

        Returns:
            Columns `KL` (zero without a reference), `LOSS`, `RECALL_LOSS` (nats) and `RECALL_HITS` (tokens to be
            recalled that the model's first choice gets right).
        """
        windows = self._batches[batch]
        B, S = hidden.shape[:2]
        device = hidden.device
        targets = windows.ids[:, 1:].to(device).flatten()
        recalled = torch.zeros(B * S, dtype=torch.bool, device=device)
        if windows.recall is not None:
            recalled = windows.recall[:, 1:].to(device).bool().flatten()
        weights = self.weights[batch].to(device).flatten() if batch in self.weights else None
        table = torch.zeros(NUM_SCORES, B * S, dtype=torch.float32, device=device)
        reference = self._reference(batch) if self.has_reference(batch) else None
        for rows in self._blocks(B * S):
            logits = self._logits(hidden.flatten(0, 1)[rows])
            lse = logits.logsumexp(-1)
            table[LOSS, rows] = lse - logits.gather(-1, targets[rows, None]).squeeze(-1)
            if recalled[rows].any():
                table[RECALL_LOSS, rows] = table[LOSS, rows] * recalled[rows]
                table[RECALL_HITS, rows] = ((logits.argmax(-1) == targets[rows]) & recalled[rows]).float()
            if reference is not None:
                probabilities, neg_entropy = next(reference)
                kl = neg_entropy - torch.linalg.vecdot(probabilities, logits) + lse
                # Rounding may leave -1e-7 where predictions agree; the lower bound wants no negative token.
                table[KL, rows] = kl.clamp_(min=0.0) if weights is None else kl.clamp_(min=0.0) * weights[rows]
        return table.view(NUM_SCORES, B, S).double().sum(-1).T.cpu()

    @torch.inference_mode()
    def token_losses(self, batch: int, hidden: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The loss of every token in nats, fp32 `[B, S]`, for `hidden` of the windows' tokens from `start` on."""
        targets = self._batches[batch].ids[:, start + 1 : start + 1 + hidden.shape[1]].to(hidden.device).flatten()
        losses = []
        for rows in self._blocks(targets.numel()):
            logits = self._logits(hidden.flatten(0, 1)[rows])
            losses.append(logits.logsumexp(-1) - logits.gather(-1, targets[rows, None]).squeeze(-1))
        return torch.cat(losses).view(hidden.shape[:2])

    @property
    def _vocabulary(self) -> int:
        return self._head.weight.shape[0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden.to(self._head.weight.device)).float().to(hidden.device)

    def _blocks(self, rows: int) -> Iterator[slice]:
        step = max(1, LOGITS_BLOCK_BYTES // (4 * self._vocabulary))
        return (slice(first, min(first + step, rows)) for first in range(0, rows, step))

    def _reference(self, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if batch in self._probabilities:
            return iter(self._probabilities[batch])
        return self._make_reference(batch)

    def _make_reference(self, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Block by block the probabilities `[rows, V]` and their negative entropy `[rows]`."""
        hidden = self._hidden[batch].flatten(0, 1)
        for rows in self._blocks(hidden.shape[0]):
            log_probabilities = self._logits(hidden[rows]).log_softmax(-1)
            probabilities = log_probabilities.exp()
            yield probabilities, torch.linalg.vecdot(probabilities, log_probabilities)
