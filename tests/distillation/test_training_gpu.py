"""A training step on a GPU, in bf16 on the Triton kernels, has the gradients of fp32 on the CPU, roughly."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from indexcache import IndexCacheForCausalLM
from indexcache.distillation.losses import multi_layer_loss
from indexcache.distillation.trainer import freeze_for

SIZES = dict(
    index_share_pattern="FSFS", index_topk=32, index_head_dim=32, kv_lora_rank=64, qk_rope_head_dim=16, q_lora_rank=64
)


def gradients(model, ids, stage):
    freeze_for(stage, model)
    labels = {"labels": ids} if stage == "sparse" else {}
    outputs = model.train()(ids, indexer_training=stage, skip_logits=True, use_cache=False, **labels)
    loss = multi_layer_loss(outputs.indexer_kl, model.config.share_pattern)
    (loss if outputs.loss is None else loss + outputs.loss).backward()
    return outputs, {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_on_a_gpu_are_those_of_the_cpu(stage, packed):
    ids = torch.randint(0, 97, (2, 150))
    cpu = tiny_model(**SIZES)
    gpu = IndexCacheForCausalLM._from_config(tiny_config(**SIZES), attn_implementation="triton")
    gpu.load_state_dict(cpu.state_dict())
    positions = {"position_ids": torch.cat((torch.arange(90), torch.arange(60)))[None]} if packed else {}
    with_positions = {name: value.cuda() for name, value in positions.items()}
    expected, wanted = gradients(_with(cpu, positions), ids, stage)
    with torch.autocast("cuda", torch.bfloat16):
        found, got = gradients(_with(gpu.cuda(), with_positions), ids.cuda(), stage)
    torch.testing.assert_close(found.indexer_kl.cpu(), expected.indexer_kl, rtol=0.1, atol=2e-3)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # Selections differ where scores nearly tie in bf16, so directions are compared.
        similarity = torch.cosine_similarity(got[name].flatten(), gradient.flatten(), dim=0)
        assert similarity > 0.8, (name, float(similarity))


def _with(model, positions):
    """The model with `position_ids` always given."""
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs, **positions)
    return model
