"""Training the indexers: the divergence of each layer's attention from the indexer that serves it.

`forward(..., indexer_training="dense" | "sparse")` adds it to the model's output. A full layer hands its indexer's
tensors on (`IndexerTrace`), so that every layer it serves can be compared with them. Indexers read detached hidden
states and attention is a target without gradient: divergences train indexers and nothing else, and as selecting is
not differentiable, a loss on the logits trains everything but them.

Source: IndexCache (arXiv 2603.12201), section 3.3, equation 1; the two stages: DeepSeek-V3.2 report, section 2.1.

Legend: B batch, S queries, T keys, H attention heads, K selected keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...kernels.indexer_distillation.indexer_distillation import (
    attention_lse,
    dense_indexer_kl,
    indexer_kl,
    selected_attention,
)
from ...kernels.sparse_mla.sparse_mla import sparse_mla
from ..attention.attention_backends import TRITON_ATTENTION
from ..attention.key_visibility import KeyVisibility

STAGES = ("dense", "sparse")
# Largest block of absorbed queries, or of attention on all keys, in bytes.
BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class IndexerTraining:
    """What to compute.

    Args:
        stage: `dense`: attention sees every key and the divergence is over all of them (warm-up); `sparse`: over the
            selected keys, both distributions renormalised.
        cross_layer: compare the layers that a full layer serves with its indexer too; without, only itself.
        recall_queries: measure, for so many last queries, which share of attention's mass the selection holds.

    Raises:
        ValueError: unknown stage.
    """

    stage: str
    cross_layer: bool = True
    recall_queries: int = 0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"indexer_training must be {' or '.join(map(repr, STAGES))} (got {self.stage!r})")

    @classmethod
    def of(cls, value: str | IndexerTraining | None, config: Any, cache: Any) -> IndexerTraining | None:
        """What `forward` was given, a stage's name or all of it, checked against the model and its cache.

        Raises:
            ValueError: unknown stage, a model without indexers, or a cache.
        """
        if value is None:
            return None
        if config.index_topk is None:
            raise ValueError("indexer_training needs indexers, and index_topk=None makes every layer dense")
        if cache is not None:
            raise ValueError("indexer_training runs whole sequences: drop past_key_values")
        return cls(value) if isinstance(value, str) else value


class IndexerTrace(NamedTuple):
    """What a full layer hands to the layers that it serves, and what each layer adds.

    Attributes:
        q: the indexer's queries `[B, S, H_I, D_I]`, differentiable in the indexer's weights alone, as are
        k: its keys `[B, T, D_I]`, and
        weights: its head weights `[B, S, H_I]`.
        indices: the selection, int32 `[B, S, K]`; in the dense stage of the last `recall_queries` queries, or None.
        kl: of the layer that returned this: mean KL over real tokens, fp32 `[]`; None where none was asked for.
        recall: of the layer that returned this: share of attention's mass, fp32 `[]`, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor | None
    kl: torch.Tensor | None = None
    recall: torch.Tensor | None = None


def trace_indexer(
    indexer: Any,
    hidden_states: torch.Tensor,
    q_resid: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    visibility: KeyVisibility,
    training: IndexerTraining,
) -> IndexerTrace:
    """Run a full layer's indexer with gradients to its weights, and select.

    Args:
        indexer: an `IndexCacheIndexer`.
        hidden_states: `[B, S, hidden_size]`, normed; detached here, as is
        q_resid: the query latent `[B, S, q_lora_rank]`.
        position_embeddings: `(cos, sin)`, each `[B, S, R]`.
        visibility: which keys each query may see.
        training: what to compute.
    """
    q, k, weights = indexer.project(hidden_states.detach(), q_resid.detach(), position_embeddings)
    num_queries = q.shape[1]
    wanted = num_queries if training.stage == "sparse" else min(training.recall_queries, num_queries)
    first = num_queries - wanted
    indices = None
    if wanted:
        seen, num_keys = visibility.of_queries(first, num_queries), k.shape[1]
        if num_keys <= indexer.index_topk:
            indices = seen.for_keys(num_keys).every_index(wanted, num_keys, k.shape[0])
        else:
            with torch.autocast(k.device.type, enabled=False):
                indices = indexer.select(q[:, first:], k, weights[:, first:], seen)
    return IndexerTrace(q, k, weights, indices)


def compare_attention(
    attention: Any,
    trace: IndexerTrace,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latents: torch.Tensor,
    visibility: KeyVisibility,
    training: IndexerTraining,
    *,
    is_full: bool,
    lse: torch.Tensor | None = None,
) -> IndexerTrace:
    """`trace` with the divergence of one layer's attention from the indexer that serves it.

    Args:
        attention: the layer's `IndexCacheAttention`.
        trace: what its full layer handed on.
        q_nope: `[B, S, H, nope]`.
        q_rope: `[B, S, H, R]`.
        latents: `[B, S, C + R]`.
        visibility: which keys each query may see.
        training: what to compute.
        is_full: whether the layer is the full one itself.
        lse: log-sum-exp of attention's scores over the selected keys, fp32 `[B, S, H]`; computed here when None.

    Raises:
        ValueError: where each process has some of the heads, whose mean would be none of all.
    """
    batch, num_queries, heads, _ = q_nope.shape
    if heads != attention.config.num_attention_heads:
        raise ValueError(
            f"indexer_training compares with the mean over {attention.config.num_attention_heads} heads, and tensor "
            f"parallelism left {heads} of them here: train with FSDP2 or DDP instead"
        )
    learns = training.cross_layer or is_full
    step = max(1, BLOCK_BYTES // (batch * heads * latents.shape[-1] * latents.element_size()))
    visibility, latents = visibility.for_keys(latents.shape[1]), latents.detach()
    parts, recall = [], None
    # What the ops compute in fp32 stays fp32 under autocast.
    with torch.autocast(latents.device.type, enabled=False):
        for first in range(0, num_queries, step):
            rows = slice(first, min(first + step, num_queries))
            queries = _absorb(attention, q_nope[:, rows], q_rope[:, rows])
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                parts.append(_token_kl(attention, trace, queries, latents, visibility, training, rows, lse))
        if training.recall_queries:
            first = max(0, num_queries - training.recall_queries)
            queries = _absorb(attention, q_nope[:, first:], q_rope[:, first:])
            assert trace.indices is not None
            recall = _selected_mass(
                attention, queries, latents, trace.indices, visibility.of_queries(first, num_queries)
            )
    return trace._replace(kl=_mean_over_tokens(torch.cat(parts, dim=1), visibility), recall=recall)


@torch.no_grad()
def _absorb(attention: Any, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
    """Queries in the latent space, `[B, S, H, C + R]`."""
    to_latent, _ = attention._absorbed_weights(q_nope)
    return torch.cat((torch.einsum("bshn,hnc->bshc", q_nope, to_latent.to(q_nope.dtype)), q_rope), dim=-1)


def _token_kl(
    attention: Any,
    trace: IndexerTrace,
    queries: torch.Tensor,
    latents: torch.Tensor,
    visibility: KeyVisibility,
    training: IndexerTraining,
    rows: slice,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """fp32 `[B, rows]`: KL of the head-averaged attention of some queries to the indexer's softmax."""
    allow_triton = attention.config._attn_implementation == TRITON_ATTENTION
    index_q, index_weights = trace.q[:, rows], trace.weights[:, rows]
    if training.stage == "dense":
        seen = visibility.of_queries(rows.start, rows.stop)
        return dense_indexer_kl(
            index_q,
            trace.k,
            index_weights,
            queries,
            latents,
            attn_scale=attention.scaling,
            query_start=seen.query_start,
            key_start=seen.key_start,
            key_mask=seen.key_mask,
            allow_triton=allow_triton,
        )
    assert trace.indices is not None
    indices = trace.indices[:, rows]
    with torch.no_grad():
        if lse is None:
            known = sparse_mla(
                queries,
                latents,
                indices,
                scale=attention.scaling,
                value_dim=attention.kv_lora_rank,
                allow_triton=allow_triton,
            )[1]
        else:
            known = lse[:, rows]
        target = selected_attention(
            queries, latents, known, indices, scale=attention.scaling, allow_triton=allow_triton
        )
    return indexer_kl(index_q, trace.k, index_weights, indices, target, allow_triton=allow_triton)


def _mean_over_tokens(kl: torch.Tensor, visibility: KeyVisibility) -> torch.Tensor:
    """The mean of `[B, S]` over queries that are no padding."""
    mask = visibility.key_mask
    if mask is None:
        return kl.mean()
    real = mask.any(-1) if mask.dim() == 3 else mask[:, : kl.shape[1]]
    return (kl * real).sum() / real.sum().clamp(min=1)


@torch.no_grad()
def _selected_mass(
    attention: Any,
    queries: torch.Tensor,
    latents: torch.Tensor,
    indices: torch.Tensor,
    visibility: KeyVisibility,
) -> torch.Tensor:
    """The share of attention's mass on all visible keys that falls on the selected ones, `[]`.

    `queries [B, Q, H, C + R]` are the last of the sequence, and `indices [B, >= Q, K]` end with theirs.
    """
    options: dict[str, Any] = {
        "scale": attention.scaling,
        "allow_triton": attention.config._attn_implementation == TRITON_ATTENTION,
    }
    lse = attention_lse(
        queries,
        latents,
        query_start=visibility.query_start,
        key_start=visibility.key_start,
        key_mask=visibility.key_mask,
        **options,
    )
    chosen = indices[:, indices.shape[1] - queries.shape[1] :]
    mass = selected_attention(queries, latents, lse, chosen.contiguous(), **options).sum(-1)
    real = lse[..., 0] > float("-inf")
    return (mass * real).sum() / real.sum().clamp(min=1)


def training_outputs(traces: list[IndexerTrace]) -> dict[str, Any]:
    """What the layers measured, for the model's output: `indexer_kl [layers]`, and `attention_recall [layers]`."""
    if not traces:
        return {}
    found = {"indexer_kl": [trace.kl for trace in traces], "attention_recall": [trace.recall for trace in traces]}
    # Layers may stand on several devices.
    return {
        name: torch.stack([value.to(values[0].device) for value in values if value is not None])
        for name, values in found.items()
        if values[0] is not None
    }
