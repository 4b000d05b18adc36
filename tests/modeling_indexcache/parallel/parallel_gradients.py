"""Run under torchrun: loss and every gradient of a model sharded over two processes equal those of one process.

On the GPUs where there are some.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import indexcache  # noqa: F401

SPLITS = {
    "tensor": DistributedConfig(tp_size=2),
    "expert": DistributedConfig(tp_size=2, ep_size=2),
    "data": DistributedConfig(fsdp_size=2),
    "data, expert": DistributedConfig(fsdp_size=2, ep_size=2),
}


def gathered(tensor):
    """A sharded tensor whole. `full_tensor` before torch 2.13 does not know what packed weights are split as."""
    placement = tensor.placements[0]
    if len(tensor.placements) > 1 or type(placement).__name__ != "_StridedShard":
        return tensor.full_tensor()
    local = tensor.to_local().contiguous()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    pieces = [part.chunk(placement.split_factor, placement.dim) for part in parts]
    return torch.cat([piece[i] for i in range(placement.split_factor) for piece in pieces], placement.dim)


folder, split = sys.argv[1:]
torch.set_num_threads(1)
ids = torch.randint(2, 96, (2, 40), generator=torch.Generator().manual_seed(0))
for backend, experts in (("sdpa", "grouped_mm"), ("eager", "eager")):
    options = dict(attn_implementation=backend, experts_implementation=experts)
    sharded = AutoModelForCausalLM.from_pretrained(folder, distributed_config=SPLITS[split], **options).train()
    whole = AutoModelForCausalLM.from_pretrained(folder, **options).to(sharded.device).train()
    ids = ids.to(sharded.device)
    # Below top-k, above it, and few queries on a long prefix; FSDP has freed the weights that made a prefix.
    prefixes = ((0, 10), (0, 40), (37, 40)) if "data" not in split else ((0, 10), (0, 40))
    for first, last in prefixes:
        losses = []
        for model in (whole, sharded):
            model.zero_grad()
            rows = ids if model is whole or "data" not in split else ids[dist.get_rank() :][:1]
            prefix = model(rows[:, :first], use_cache=True).past_key_values if first else None
            shown = dict(input_ids=rows[:, first:last], labels=rows[:, first:last])
            losses.append(model(**shown, past_key_values=prefix, use_cache=first > 0).loss)
            losses[-1].backward()
        expected, loss = losses[0].detach(), losses[1].detach().clone()
        if "data" in split:
            dist.all_reduce(loss)
            loss /= 2
        torch.testing.assert_close(loss, expected)
        gradients = {name: p.grad for name, p in sharded.named_parameters()}
        for name, parameter in whole.named_parameters():
            found, expected = gradients[name], parameter.grad
            found = gathered(found) if isinstance(found, DTensor) else found
            what = f"{backend}, tokens {first} to {last}, {name}"
            if expected is None or found is None:
                assert found is expected, f"{what}: {found} against {expected}"
                continue
            off = ((found - expected).norm() / expected.norm().clamp(min=1e-6)).item()
            assert off < 1e-4, f"{what}: the gradient is off by {off:.1%}"
print(f"rank {dist.get_rank()} agrees")
dist.destroy_process_group()
