"""Run under torchrun: logits and generation of a model sharded over the processes equal those of one process."""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import indexcache  # noqa: F401

folder, ep_size = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
split = DistributedConfig(tp_size=2, ep_size=ep_size) if ep_size > 1 else DistributedConfig(tp_size=2)
sharded = AutoModelForCausalLM.from_pretrained(folder, distributed_config=split)
whole = AutoModelForCausalLM.from_pretrained(folder)
ids = torch.arange(2, 62).unsqueeze(0)
options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=1)
with torch.no_grad():
    torch.testing.assert_close(sharded(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(sharded.generate(ids, **options), whole.generate(ids, **options))
local = sharded.model.layers[1].self_attn.q_b_proj.weight.to_local().shape[0]
assert 2 * local == whole.model.layers[1].self_attn.q_b_proj.weight.shape[0]
print(f"rank {dist.get_rank()} agrees")
dist.destroy_process_group()
