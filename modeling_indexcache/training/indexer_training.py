"""Training the indexers: the divergence of each layer's attention from the indexer that serves it.

`forward(..., indexer_training="dense" | "sparse")` adds it to the model's output. A full layer hands its indexer's
tensors on (`IndexerTrace`), so that every layer it serves can be compared with them. Indexers read detached hidden
states and attention is a target without gradient: divergences train indexers and nothing else, and as selecting is
not differentiable, a loss on the logits trains everything but them.

Source: IndexCache (arXiv 2603.12201), section 3.3, equation 1; the two stages: DeepSeek-V3.2 report, section 2.1.

Legend: B batch, S queries, T keys, H attention heads, K selected keys.
"""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.indexer_distillation.indexer_distillation import (
    attention_lse,
    dense_indexer_kl,
    indexer_kl,
    selected_attention,
)
from ...kernels.sparse_mla.sparse_mla import sparse_mla
from ..attention.absorbed_weights import absorbed_weights
from ..attention.key_visibility import KeyVisibility
from ..forward_arguments import IndexerTraining
from ..forward_plan import ForwardPlan, LayerReport
from ..selection import IndexerTrace

# Largest block of absorbed queries, or of attention on all keys, in bytes.
BLOCK_BYTES = 256 * 2**20


def trace_indexer(
    indexer: Any,
    hidden_states: torch.Tensor,
    q_resid: torch.Tensor,
    plan: ForwardPlan,
    training: IndexerTraining,
) -> IndexerTrace:
    """Run a full layer's indexer with gradients to its weights, and select.

    Args:
        indexer: an `IndexCacheIndexer`.
        hidden_states: `[B, S, hidden_size]`, normed; detached here, as is
        q_resid: the query latent `[B, S, q_lora_rank]`.
        plan: of the forward.
        training: what to compute.
    """
    q, k, weights = indexer.project(hidden_states.detach(), q_resid.detach(), plan.angles)
    num_queries = q.shape[1]
    wanted = num_queries if training.stage == "sparse" else min(training.recall_queries, num_queries)
    first = num_queries - wanted
    indices = None
    if wanted:
        seen, num_keys = plan.visibility.of_queries(first, num_queries), k.shape[1]
        if num_keys <= indexer.index_topk:
            indices = seen.for_keys(num_keys).every_index(wanted, num_keys, k.shape[0])
        else:
            with torch.autocast(k.device.type, enabled=False):
                indices = indexer.select(q[:, first:], k, weights[:, first:], seen)
    return IndexerTrace(q, k, weights, indices)


def compare_attention(
    attention: Any,
    trace: IndexerTrace,
    q: tuple[torch.Tensor, torch.Tensor],
    latents: torch.Tensor,
    plan: ForwardPlan,
    training: IndexerTraining,
    lse: torch.Tensor | None = None,
) -> LayerReport:
    """The divergence of one layer's attention from the indexer that serves it.

    Args:
        attention: the layer's `IndexCacheAttention`.
        trace: what its full layer handed on.
        q: `[B, S, H, nope]` and `[B, S, H, R]`, after RoPE.
        latents: `[B, S, C + R]`.
        plan: of the forward.
        training: what to compute.
        lse: log-sum-exp of attention's scores over the selected keys, fp32 `[B, S, H]`; computed here when None.

    Raises:
        ValueError: where each process has some of the heads, whose mean would be none of all.
    """
    q_nope, q_rope = q
    batch, num_queries, heads, _ = q_nope.shape
    if heads != attention.config.num_attention_heads:
        raise ValueError(
            f"indexer_training compares with the mean over {attention.config.num_attention_heads} heads, and tensor "
            f"parallelism left {heads} of them here: train with FSDP2 or DDP instead"
        )
    learns = training.cross_layer or plan.is_full(attention.layer_idx)
    step = max(1, BLOCK_BYTES // (batch * heads * latents.shape[-1] * latents.element_size()))
    visibility, latents = plan.visibility.for_keys(latents.shape[1]), latents.detach()
    parts, recall = [], None
    with torch.no_grad():
        # Adapters on `kv_b_proj` are called with inputs of autocast's dtype, as attention calls them.
        to_latent = absorbed_weights(attention, q_nope)[0].to(q_nope.dtype)
    # What the ops compute in fp32 stays fp32 under autocast.
    with torch.autocast(latents.device.type, enabled=False):
        for first in range(0, num_queries, step):
            rows = slice(first, min(first + step, num_queries))
            queries = _absorb(to_latent, q_nope[:, rows], q_rope[:, rows])
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                if training.stage == "dense":
                    seen = visibility.of_queries(rows.start, rows.stop)
                    parts.append(_dense_kl(attention, trace, queries, latents, seen, rows, plan.allow_triton))
                else:
                    known = None if lse is None else lse[:, rows]
                    parts.append(_sparse_kl(attention, trace, queries, latents, known, rows, plan.allow_triton))
        if training.recall_queries:
            first = max(0, num_queries - training.recall_queries)
            queries = _absorb(to_latent, q_nope[:, first:], q_rope[:, first:])
            assert trace.indices is not None
            seen = visibility.of_queries(first, num_queries)
            recall = _selected_mass(attention.scaling, queries, latents, trace.indices, seen, plan.allow_triton)
    return LayerReport(_mean_over_tokens(torch.cat(parts, dim=1), visibility), recall)


@torch.no_grad()
def _absorb(to_latent: torch.Tensor, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
    """Queries in the latent space, `[B, S, H, C + R]`, by `W_UK [H, nope, C]`."""
    return torch.cat((torch.einsum("bshn,hnc->bshc", q_nope, to_latent), q_rope), dim=-1)


def _dense_kl(
    attention: Any,
    trace: IndexerTrace,
    queries: torch.Tensor,
    latents: torch.Tensor,
    seen: KeyVisibility,
    rows: slice,
    allow_triton: bool,
) -> torch.Tensor:
    """fp32 `[B, rows]`: KL of the head-averaged attention of some queries, to all keys, to the indexer's softmax."""
    options: dict[str, Any] = {"attn_scale": attention.scaling, "allow_triton": allow_triton, **seen.limits()}
    return dense_indexer_kl(trace.q[:, rows], trace.k, trace.weights[:, rows], queries, latents, **options)


def _sparse_kl(
    attention: Any,
    trace: IndexerTrace,
    queries: torch.Tensor,
    latents: torch.Tensor,
    lse: torch.Tensor | None,
    rows: slice,
    allow_triton: bool,
) -> torch.Tensor:
    """The same over the selected keys; `lse [B, rows, H]` of attention's scores on them is computed when None."""
    assert trace.indices is not None
    indices = trace.indices[:, rows]
    options: dict[str, Any] = {"scale": attention.scaling, "allow_triton": allow_triton}
    with torch.no_grad():
        if lse is None:
            _, lse = sparse_mla(queries, latents, indices, value_dim=attention.kv_lora_rank, **options)
        target = selected_attention(queries, latents, lse, indices, **options)
    options = {"allow_triton": allow_triton}
    return indexer_kl(trace.q[:, rows], trace.k, trace.weights[:, rows], indices, target, **options)


def _mean_over_tokens(kl: torch.Tensor, visibility: KeyVisibility) -> torch.Tensor:
    """The mean of `[B, S]` over queries that are no padding."""
    mask = visibility.key_mask
    if mask is None:
        return kl.mean()
    real = mask.any(-1) if mask.dim() == 3 else mask[:, : kl.shape[1]]
    return (kl * real).sum() / real.sum().clamp(min=1)


@torch.no_grad()
def _selected_mass(
    scale: float,
    queries: torch.Tensor,
    latents: torch.Tensor,
    indices: torch.Tensor,
    visibility: KeyVisibility,
    allow_triton: bool,
) -> torch.Tensor:
    """The share of attention's mass on all visible keys that falls on the selected ones, `[]`.

    `queries [B, Q, H, C + R]` are the last of the sequence, and `indices [B, >= Q, K]` end with theirs.
    """
    options: dict[str, Any] = {"scale": scale, "allow_triton": allow_triton}
    lse = attention_lse(queries, latents, **visibility.limits(), **options)
    chosen = indices[:, indices.shape[1] - queries.shape[1] :]
    mass = selected_attention(queries, latents, lse, chosen.contiguous(), **options).sum(-1)
    real = lse[..., 0] > float("-inf")
    return (mass * real).sum() / real.sum().clamp(min=1)


def training_outputs(reports: list[LayerReport]) -> dict[str, Any]:
    """What the layers measured, for the model's output: `indexer_kl [layers]`, and `attention_recall [layers]`."""
    outputs = {}
    for name, values in zip(("indexer_kl", "attention_recall"), zip(*reports)):
        if values[0] is not None:
            # Layers may stand on several devices.
            outputs[name] = torch.stack([value.to(values[0].device) for value in values])
    return outputs
