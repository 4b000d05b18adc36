"""Under autocast experts multiply in its dtype, with the numbers and gradients of routing in that dtype."""

import pytest
import torch
from tiny_models import tiny_model

from indexcache.distillation.autocast_experts import GROUPED, NAME, use_autocast_experts

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def step(model, ids, device):
    """Loss, gradients, and the dtypes in which gate and up were multiplied."""
    dtypes = []
    experts = model.model.layers[1].mlp.experts
    apply_gate = experts._apply_gate
    experts._apply_gate = lambda x: dtypes.append(x.dtype) or apply_gate(x)
    with torch.autocast(device, torch.bfloat16):
        loss = model.train()(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}, dtypes


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_experts_run_in_the_dtype_of_autocast(device):
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0)).to(device)
    usual, cast = tiny_model().to(device), tiny_model().to(device)
    use_autocast_experts(cast)
    assert cast.config._experts_implementation == NAME
    loss, gradients, wide = step(usual, ids, device)
    cast_loss, cast_gradients, narrow = step(cast, ids, device)
    assert set(wide) == {torch.float32} and set(narrow) == {torch.bfloat16}
    assert cast_loss == pytest.approx(loss, rel=5e-3)
    assert cast_gradients.keys() == gradients.keys()
    for name in gradients:
        if ".experts." in name:
            one, other = cast_gradients[name], gradients[name]
            assert one.dtype == torch.float32
            assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99, name


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
