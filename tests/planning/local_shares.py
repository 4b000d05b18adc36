"""What transformers' plans leave on the first of several ranks: bytes of weights, and of copies after a forward.

Run as a script: no other rank is there, and what they would send is not needed to count bytes.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import indexcache  # noqa: F401
from indexcache.modeling_indexcache.attention.absorbed_weights import kept_of

ranks, *folders = sys.argv[1:]
os.environ |= {"RANK": "0", "WORLD_SIZE": ranks, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": ranks}
torch.set_num_threads(1)


def local_bytes(tensor):
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.numel() * part.element_size()


def shares(folder, ep_size):
    dist.init_process_group("fake", rank=0, world_size=int(ranks), store=FakeStore())
    split = DistributedConfig(tp_size=int(ranks), ep_size=ep_size)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", distributed_config=split)
    with torch.no_grad():
        model(torch.arange(40)[None])
    kept = [kept_of(module) for module in model.modules()]
    found = {
        "weights": sum(map(local_bytes, model.parameters()))
        + sum(local_bytes(b) for name, b in model.named_buffers() if name.endswith("correction_bias")),
        "experts": sum(local_bytes(p) for name, p in model.named_parameters() if ".mlp.experts." in name),
        "absorbed": sum(made[1].untyped_storage().nbytes() for made in kept if made is not None),
    }
    dist.destroy_process_group()
    return found


print(json.dumps([shares(folder, ep_size) for folder in folders for ep_size in (1, int(ranks))]))
