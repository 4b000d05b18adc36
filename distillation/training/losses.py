"""The multi-layer distillation loss: what the divergences that the model returns are added up to.

A full layer l serves layers l .. l+m. IndexCache (arXiv 2603.12201), equation 1:
L_multi = sum over j = 0..m of 1/(m+1) * KL(p^(l+j) || q^(l)), p a layer's head-averaged attention, q the softmax of
the indexer's scores. Equation 2, L_avg, is the divergence of the mean of the p's: the gradients are the same
(proposition 1), because q alone has parameters and KL(p || q) is linear in p but for p's own entropy.

Legend: B batch, S queries, K keys.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ...configuration.share_pattern import SharePattern


def layer_weights(pattern: SharePattern, cross_layer: bool = True) -> torch.Tensor:
    """The factor of each layer's divergence in L_multi, fp64 `[layers]`: 1/(m+1) for the m+1 layers of a group.

    Args:
        pattern: which layers run their indexer.
        cross_layer: False leaves out the layers that a full layer serves beside itself (the paper's ablation).
    """
    weights = torch.zeros(len(pattern), dtype=torch.float64)
    for full, served in pattern.groups.items():
        if cross_layer:
            weights[served] = 1 / len(served)
        else:
            weights[full] = 1
    return weights


def multi_layer_loss(kl: torch.Tensor, pattern: SharePattern, cross_layer: bool = True) -> torch.Tensor:
    """L_multi, added up over the full layers.

    Args:
        kl: divergence of each layer's attention from the indexer that serves it, `[layers]` (`indexer_kl` of the
            model's output).
        pattern: which layers run their indexer.
        cross_layer: see `layer_weights`.
    """
    return (kl * _weights_like(pattern, cross_layer, kl.device, kl.dtype)).sum()


@lru_cache(maxsize=64)
def _weights_like(pattern: SharePattern, cross_layer: bool, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`layer_weights` on a device, copied there once: a copy waits for what the device is doing."""
    with torch.inference_mode(False):
        return layer_weights(pattern, cross_layer).to(device, dtype)


def group_means(kl: torch.Tensor, pattern: SharePattern) -> dict[int, torch.Tensor]:
    """Each full layer's mean divergence over the layers it serves."""
    return {full: kl[served].mean() for full, served in pattern.groups.items()}
