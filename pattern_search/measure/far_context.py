"""Which tokens need far context: those that the model predicts worse when it sees only what is near.

Legend: B windows, S tokens, C tokens of a chunk.
"""

from __future__ import annotations

import torch

from .layer_engine import LayerEngine
from .objective import TokenScorer

# Chunks per window, and the most nats that far context may count for one token.
CHUNKS, MOST_NATS = 8, 8.0


@torch.inference_mode()
def far_context_weights(engine: LayerEngine, scorer: TokenScorer, batch: int, losses: torch.Tensor) -> torch.Tensor:
    """Weights `1 + nats lost without far context`, each window's mean 1.

    The windows are run twice more in chunks of an eighth, the second time shifted by half a chunk, so that every
    token is scored with between half a chunk and a chunk of context. That counts as two passes of all layers.

    Args:
        engine: runs the chunks.
        scorer: scores them.
        batch: its number.
        losses: each token's loss with all its context, `[B, S]`.

    Returns:
        fp32 `[B, S]`.
    """
    B, S = losses.shape
    chunk = max(2, -(-S // CHUNKS))
    near = losses.clone()
    for shift in (0, chunk // 2):
        for start in range(shift, S, chunk):
            stop = min(start + chunk, S)
            trusted = start + chunk // 2 if start else 0
            if trusted >= stop:
                continue
            hidden = engine.last_hidden_of(engine.batches[batch][:, start:stop])
            near[:, trusted:stop] = scorer.token_losses(batch, hidden, start)[:, trusted - start :]
    engine.layer_forwards += 2 * B * engine.num_layers
    weights = 1 + (near - losses).clamp(0, MOST_NATS)
    return weights / weights.mean(-1, keepdim=True)
