"""Every expert on every token gives what routing to experts gives, and its gradients."""

import torch
from testing.tiny_models import tiny_model

from indexcache.distillation.training.all_experts import use_all_experts


def test_all_experts_equal_routed_ones():
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    routed, dense = tiny_model(), tiny_model()
    routed.set_experts_implementation("eager")
    use_all_experts(dense)
    losses = [model.train()(ids, labels=ids, use_cache=False).loss for model in (routed, dense)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for (name, one), (_, other) in zip(routed.named_parameters(), dense.named_parameters()):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5, msg=name)
