"""The multi-layer loss: its factors, and that it has the gradients of the averaged-target form."""

import pytest
import torch

from indexcache import SharePattern
from indexcache.distillation.training.losses import group_means, layer_weights, multi_layer_loss
from indexcache.kernels.indexer_distillation.indexer_distillation import dense_indexer_kl, indexer_kl

B, S, T, H, D, K, SERVED = 2, 7, 11, 4, 8, 5, 3


def tensors():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, S, H, D, dtype=torch.float64, generator=generator)
    k = torch.randn(B, T, D, dtype=torch.float64, generator=generator)
    weights = torch.randn(B, S, H, dtype=torch.float64, generator=generator)
    return [x.requires_grad_() for x in (q, k, weights)], generator


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


def test_sparse_l_multi_and_l_avg_have_the_same_gradients():
    inputs, generator = tensors()
    indices = torch.rand(B, S, T, generator=generator).topk(K, dim=-1).indices.to(torch.int32)
    indices[0, 0, 2:] = -1
    attention = [torch.rand(B, S, K, dtype=torch.float64, generator=generator) for _ in range(SERVED)]
    attention = [p.masked_fill(indices < 0, 0) for p in attention]
    attention = [p / p.sum(-1, keepdim=True) for p in attention]
    kl = torch.stack([indexer_kl(*inputs, indices, p).sum() for p in attention])
    multi = multi_layer_loss(kl, SharePattern("FSS"))
    average = indexer_kl(*inputs, indices, torch.stack(attention).mean(0)).sum()
    for found, expected in zip(gradients(multi, inputs), gradients(average, inputs)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert found.abs().max() > 1e-3
    # They differ by the entropies alone: L_multi is the larger one.
    assert multi > average


def test_dense_l_multi_and_l_avg_have_the_same_gradients():
    inputs, generator = tensors()
    q = [torch.randn(B, S, 3, 6, dtype=torch.float64, generator=generator) for _ in range(SERVED)]
    kv = [torch.randn(B, T, 6, dtype=torch.float64, generator=generator) for _ in range(SERVED)]
    kl = torch.stack([dense_indexer_kl(*inputs, *layer, attn_scale=0.4).sum() for layer in zip(q, kv)])
    multi = multi_layer_loss(kl, SharePattern("FSS"))
    average = dense_indexer_kl(*inputs, q, kv, attn_scale=0.4).sum()
    for found, expected in zip(gradients(multi, inputs), gradients(average, inputs)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert found.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("pattern", "cross_layer", "expected"),
    [
        ("FSSF", True, [1 / 3, 1 / 3, 1 / 3, 1]),
        ("FSSF", False, [1, 0, 0, 1]),
        ("FFFF", True, [1, 1, 1, 1]),
        ("FFFF", False, [1, 1, 1, 1]),
        ("FSFSS", True, [1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_every_full_layer_weighs_one(pattern, cross_layer, expected):
    weights = layer_weights(SharePattern(pattern), cross_layer)
    assert weights.tolist() == pytest.approx(expected)
    assert float(weights.sum()) == pytest.approx(pattern.count("F"))


def test_group_means_are_the_terms_of_l_multi():
    kl = torch.tensor([3.0, 5.0, 1.0, 2.0])
    pattern = SharePattern("FSFS")
    assert {full: float(value) for full, value in group_means(kl, pattern).items()} == {0: 4.0, 2: 1.5}
    assert float(multi_layer_loss(kl, pattern)) == 5.5
