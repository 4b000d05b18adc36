"""The paper's similarity search (arXiv 2603.12201, appendix C), a baseline that it reports as losing.

How alike a layer's attention output stays when it reads an earlier layer's selection, and the pattern that maximises
the sum of that, by dynamic programming. Local likeness does not see how a few missed tokens cascade.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...configuration.share_pattern import FULL, SHARED
from ...modeling_indexcache.selection import Selection
from .evaluator import Evaluator
from .layer_engine import LayerEngine


def output_similarity(evaluator: Evaluator) -> torch.Tensor:
    """Mean cosine similarity of layer i's attention output with its own selection and with layer j's.

    Outputs are taken behind the output projection, where they enter the residual stream. Cost: one pass of all layers
    and one attention for every pair of layers, each counted as one layer-forward.

    Returns:
        fp64 `[N, N]`, entry `[i, j]` for j < i; 1 on the diagonal, 0 above.
    """
    engine, processes, journal = evaluator.engine, evaluator.processes, evaluator.journal
    pattern, size = evaluator.reference.letters, evaluator.num_layers
    known = journal.get("similarity", pattern, 0)
    if known is None:
        mine = processes.mine(range(len(evaluator.batches)))
        table = torch.zeros(len(evaluator.batches), size, size, dtype=torch.float64)
        for batch in mine:
            table[batch] = _of_batch(engine, batch) * len(evaluator.batches[batch])
        # Each batch's own table is gathered, so that the sum does not depend on how many processes there are.
        known = processes.gather(table).sum(0) / len(evaluator.windows)
        forwards = len(evaluator.windows) * (size + size * (size - 1) // 2)
        journal.add("similarity", pattern, 0, known, forwards)
    return known


@torch.inference_mode()
def _of_batch(engine: LayerEngine, batch: int) -> torch.Tensor:
    similarity = torch.eye(engine.num_layers, dtype=torch.float64)
    selections: list[Selection] = []

    def compare(attention: Any, args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
        for source, selection in enumerate(selections):
            shared = replace(kwargs["plan"], letters=SHARED * engine.num_layers)
            other = attention.forward(*args, selection=selection, plan=shared)[0]
            alike = F.cosine_similarity(output[0].float(), other.float(), dim=-1).double().mean()
            similarity[attention.layer_idx, source] = float(alike)
        selections.append(output[2])

    attentions: list[nn.Module] = [layer.self_attn for layer in engine.model.model.layers]
    hooks = [attention.register_forward_hook(compare, with_kwargs=True) for attention in attentions]
    try:
        engine.last_hidden_of(engine.batches[batch])
    finally:
        for hook in hooks:
            hook.remove()
    return similarity


def similarity_patterns(similarity: torch.Tensor, allowed: str) -> dict[int, str]:
    """For every number of full layers the pattern whose shared layers stay most alike.

    `dp[i][k] = max_j<i dp[j][k-1] + sum of similarity[m][j] for m in j+1 .. i-1`, where i is the k-th full layer.

    Args:
        similarity: `[N, N]` of `output_similarity`.
        allowed: a pattern whose full layers have an indexer.

    Returns:
        Letters by number of full layers.
    """
    num_layers = len(allowed)
    table = similarity.tolist()

    def served(source: int, stop: int) -> float:
        return sum(table[layer][source] for layer in range(source + 1, stop))

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    patterns: dict[int, str] = {}
    for count in range(1, allowed.count(FULL) + 1):
        finished = max((score + served(last, num_layers), full) for last, (score, full) in best.items())
        patterns[count] = "".join(FULL if layer in finished[1] else SHARED for layer in range(num_layers))
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for layer in range(1, num_layers):
            options = [
                (score + served(last, layer), (*full, layer)) for last, (score, full) in best.items() if last < layer
            ]
            if allowed[layer] == FULL and options:
                grown[layer] = max(options)
        best = grown
    return patterns
