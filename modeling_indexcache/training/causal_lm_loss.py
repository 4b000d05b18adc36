"""The language-model loss of long sequences, without logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Largest block of fp32 logits in bytes.
LOGITS_BLOCK_BYTES = 256 * 2**20


def causal_lm_loss(
    hidden_states: torch.Tensor,
    head: Any,
    labels: torch.Tensor,
    *,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **_: Any,
) -> torch.Tensor:
    """Cross-entropy of `head(hidden_states)` as transformers' `ForCausalLMLoss`, block by block.

    Logits are made again in the backward pass, so that those of one block exist at a time.

    Args:
        hidden_states: `[B, S, hidden_size]`, after the last norm.
        head: the language-model head.
        labels: `[B, S]`; token t+1 is the target of position t.
        shift_labels: `[B, S]`, the targets themselves, in place of `labels`.
        num_items_in_batch: divide the sum by this; by the number of targets when None.
        ignore_index: marks targets that do not count.
        **_: what else a forward was given.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, targets = hidden_states.flatten(0, -2), shift_labels.reshape(-1).to(hidden_states.device)
    rows = max(1, LOGITS_BLOCK_BYTES // (4 * head.out_features))
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for x, target in zip(hidden.split(rows), targets.split(rows)):
        total = total + checkpoint(
            _sum_of_losses, x, head, target, ignore_index, use_reentrant=False, preserve_rng_state=False
        )
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


def _sum_of_losses(x: torch.Tensor, head: Any, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    logits = head(x)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
