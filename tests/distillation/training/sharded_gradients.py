"""One process of several: shard a model with FSDP2 as accelerate does; its gradients are those of a whole one."""

import torch
import torch.distributed as dist
from testing.tiny_models import tiny_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from indexcache.distillation.training.losses import multi_layer_loss
from indexcache.distillation.training.trainer import freeze_for


def main():
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(0, 97, (count, 40), generator=torch.Generator().manual_seed(0))

    def gradients(model, rows, stage, share):
        freeze_for(stage, model)
        labels = {"labels": rows} if stage == "sparse" else {}
        outputs = model(rows, indexer_training=stage, skip_logits=True, use_cache=False, **labels)
        loss = multi_layer_loss(outputs.indexer_kl, model.config.share_pattern)
        loss = loss if outputs.loss is None else loss + outputs.loss
        (loss * share).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    for stage in ("dense", "sparse"):
        for checkpointing in (False, True):
            whole = gradients(tiny_model(index_share_pattern="FSFS").train(), ids, stage, 1.0)
            model = tiny_model(index_share_pattern="FSFS").train()
            if checkpointing:
                model.activation_checkpointing_enable()
            mesh = dist.device_mesh.init_device_mesh("cpu", (count,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            fully_shard(model, mesh=mesh)
            found = gradients(model, ids[rank : rank + 1], stage, 1.0)
            assert found.keys() == whole.keys(), found.keys() ^ whole.keys()
            for name, gradient in found.items():
                full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                torch.testing.assert_close(full, whole[name], rtol=1e-4, atol=1e-6, msg=name)

    model = tiny_model(index_share_pattern="FSFS").train()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    found = gradients(model, ids[rank : rank + 1], "sparse", 1.0)
    assert all(torch.isfinite(gradient.full_tensor()).all() for gradient in found.values())
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    dist.barrier()
    if rank == 0:
        print("SHARDED GRADIENTS AGREE")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
