"""Under autocast experts multiply in its dtype, with the numbers and gradients of routing in that dtype."""

import pytest
import torch
from testing.tiny_models import tiny_model

from indexcache.distillation.training.autocast_experts import GROUPED, NAME, use_autocast_experts

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def routed(experts, precision, device):
    """Output and gradients of one experts module, routing given, and the dtypes in which gates were multiplied."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 48, generator=generator).to(device).requires_grad_()
    chosen = torch.rand(60, 8, generator=generator).topk(2, dim=-1).indices.to(device)
    weights, upstream = (torch.rand(60, n, generator=generator).to(device) for n in (2, 48))
    dtypes = []
    apply_gate = type(experts)._apply_gate
    experts._apply_gate = lambda x: dtypes.append(x.dtype) or apply_gate(experts, x)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        out = experts(hidden, chosen, weights)
    (out.float() * upstream).sum().backward()
    return [out.detach(), hidden.grad, experts.gate_up_proj.grad, experts.down_proj.grad], dtypes


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_experts_run_in_the_dtype_of_autocast(device):
    # Routing is given: in bf16 a router of random weights chooses others.
    usual, cast = tiny_model().to(device), tiny_model().to(device)
    use_autocast_experts(cast)
    assert cast.config._experts_implementation == NAME
    usual, cast = (model.model.layers[1].mlp.experts for model in (usual, cast))
    exact, wide = routed(usual, "fp32", device)
    found, narrow = routed(cast, "bf16", device)
    assert set(wide) == {torch.float32} and set(narrow) == {torch.bfloat16}
    for one, right in zip(found, exact):
        # Three products of operands rounded to 2**-9.
        assert (one.float() - right).norm() <= 2**-6 * right.norm()
    assert found[2].dtype == found[3].dtype == torch.float32


def test_without_autocast_nothing_changes():
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(1))
    usual, cast = tiny_model(), tiny_model()
    use_autocast_experts(cast)
    assert torch.equal(usual(ids).logits, cast(ids).logits)


def test_other_experts_and_shapes_stay_as_they_are():
    chosen, ragged = tiny_model(), tiny_model(moe_intermediate_size=20)
    chosen.set_experts_implementation("eager")
    use_autocast_experts(chosen)
    use_autocast_experts(ragged)
    assert chosen.config._experts_implementation == "eager"
    assert ragged.config._experts_implementation == GROUPED
