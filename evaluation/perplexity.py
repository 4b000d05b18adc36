"""Language-model loss on fixed windows of tokens, those to be recalled from far back apart from the rest."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..conversion.io.sources import ConversionError
from ..runs.windows.windows import refuse_foreign_tokens

# Largest block of fp32 logits in bytes.
LOGITS_BLOCK_BYTES = 64 * 2**20
# Beyond it the perplexity is no fp64 number.
LARGEST_LOSS = math.log(sys.float_info.max)


@dataclass(frozen=True)
class WindowScores:
    """What a model scores on a set of windows; losses are means over tokens, in nats.

    Args:
        loss: over all tokens.
        text_loss: over the tokens that are not to be recalled.
        recall_loss: over the tokens to be recalled; None when no such token is marked.
        recall_accuracy: share of those that the model's first choice gets right; None likewise.
        tokens: tokens scored.
        recall_tokens: how many of them are to be recalled.
    """

    loss: float
    text_loss: float
    recall_loss: float | None
    recall_accuracy: float | None
    tokens: int
    recall_tokens: int

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite where fp64 cannot hold it."""
        return math.exp(self.loss) if self.loss < LARGEST_LOSS else math.inf


def evaluate_windows(
    model: PreTrainedModel, ids: torch.Tensor, recall_mask: torch.Tensor | None = None, batch_size: int = 1
) -> WindowScores:
    """Score a causal language model on windows of tokens: token i+1 is predicted from tokens 0 .. i.

    Logits are made from the last hidden states block by block, so that memory does not grow with length times
    vocabulary.

    Args:
        model: a causal language model whose logits are its output embedding of its base model's last hidden states,
            as those of every DSA family are; scored in evaluation mode, and left in the mode it was in.
        ids: integer tokens of shape `[N, L + 1]`; the last is only predicted.
        recall_mask: of shape `[N, L + 1]`, nonzero where a token is to be recalled; its first column is not read.
        batch_size: windows in one forward pass.

    Returns:
        The means over all windows, summed in fp64.

    Raises:
        ValueError: shapes that do not fit, or tokens outside the model's vocabulary.
    """
    loss = torch.zeros(2, dtype=torch.float64)  # text, recall
    count = torch.zeros(2, dtype=torch.int64)
    hits = 0
    start = 0
    for losses, correct in token_scores(model, ids, recall_mask, batch_size):
        recalled = torch.zeros_like(correct)
        if recall_mask is not None:
            recalled = recall_mask[start : start + len(losses), 1:].cpu().bool()
        for kind, chosen in enumerate((~recalled, recalled)):
            loss[kind] += losses[chosen].sum()
            count[kind] += chosen.sum()
        hits += int(correct[recalled].sum())
        start += len(losses)
    text, recalls = (int(n) for n in count)
    return WindowScores(
        loss=float(loss.sum() / count.sum()),
        text_loss=float(loss[0] / text) if text else math.nan,
        recall_loss=float(loss[1] / recalls) if recalls else None,
        recall_accuracy=hits / recalls if recalls else None,
        tokens=text + recalls,
        recall_tokens=recalls,
    )


@torch.inference_mode()
def token_scores(
    model: PreTrainedModel,
    ids: torch.Tensor,
    recall_mask: torch.Tensor | None = None,
    batch_size: int = 1,
    hidden_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each token's loss and whether it is the model's first choice, batch by batch, on the CPU.

    Args and errors: as `evaluate_windows`; `hidden_of` gives the last hidden states `[B, L, E]` of tokens `[B, L]`
    where layers are streamed, the model's forward where it is None. Of tokens that the mask does not mark, the first
    choice is not looked at.

    Yields:
        Losses in nats, fp64 `[B, L]`, and hits, bool `[B, L]`.
    """
    _check(model, ids, recall_mask)
    head = model.get_output_embeddings()
    rows = max(1, LOGITS_BLOCK_BYTES // (4 * head.weight.shape[0]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(ids), batch_size):
            window = ids[start : start + batch_size].to(model.device, torch.long)
            if hidden_of is None:
                hidden = model.base_model(input_ids=window[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
            else:
                hidden = hidden_of(window[:, :-1]).flatten(0, 1)
            targets = window[:, 1:].flatten()
            marked = torch.zeros_like(targets, dtype=torch.bool)
            if recall_mask is not None:
                marked = recall_mask[start : start + batch_size, 1:].to(targets.device).bool().flatten()
            losses, hits = [], []
            for x, target, mark in zip(hidden.split(rows), targets.split(rows), marked.split(rows), strict=True):
                logits = head(x.to(head.weight.device)).float().to(target.device)
                losses.append(F.cross_entropy(logits, target, reduction="none").double())
                hit = torch.zeros_like(mark)
                hit[mark] = logits[mark].argmax(-1) == target[mark]
                hits.append(hit)
            shape = (len(window), window.shape[1] - 1)
            yield torch.cat(losses).view(shape).cpu(), torch.cat(hits).view(shape).cpu()
    finally:
        model.train(was_training)


def paired_rise(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float | None]:
    """The mean difference of losses on the same windows, and its standard error; None for one window."""
    differences = [loss - other for loss, other in zip(losses, base)]
    count, mean = len(differences), math.fsum(differences) / len(differences)
    if count < 2:
        return mean, None
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    return mean, math.sqrt(variance / count)


def check_loss(loss: float, about: str, model: torch.nn.Module) -> None:
    """Refuse a mean loss in nats that is not finite, or of which fp64 holds no perplexity.

    Raises:
        ConversionError: naming the checkpoint (`about`), the loss, and the weight that stands out.
    """
    if not loss < LARGEST_LOSS:
        raise ConversionError(
            f"{about}: its loss is {loss:.4g}, no loss of a sound model ({largest_weight(model)}): are its weights "
            "damaged, or a number in config.json? Fetch both again"
        )


@torch.no_grad()
def largest_weight(model: torch.nn.Module) -> str:
    """The weight of the largest magnitude, or the first that is not finite, in words: where damage shows first."""
    largest, found = -1.0, ""
    for name, weight in model.named_parameters():
        if not weight.numel() or weight.is_meta:
            continue
        # Of fp8, which has no maximum.
        wide = weight.float() if weight.element_size() == 1 else weight
        value = float(wide.abs().max())
        if not math.isfinite(value):
            return f"{name} holds values that are not finite"
        if value > largest:
            largest, found = value, name
    return f"its largest weight, in {found}, is {largest:.3g}"


def _check(model: PreTrainedModel, ids: torch.Tensor, recall_mask: torch.Tensor | None) -> None:
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ValueError(
            f"ids must be integers of shape [N, L + 1] with L at least 1, got {ids.dtype} {tuple(ids.shape)}"
        )
    if recall_mask is not None and recall_mask.shape != ids.shape:
        raise ValueError(f"recall_mask must have the shape of ids, {tuple(ids.shape)}, got {tuple(recall_mask.shape)}")
    vocab = model.get_output_embeddings().weight.shape[0]
    refuse_foreign_tokens(ids, vocab, "ids hold")
