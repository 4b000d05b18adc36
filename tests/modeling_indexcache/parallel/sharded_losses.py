"""Run under torchrun on GPUs: what a model sharded over the processes does. FOLDER OUTPUT tensor|expert DTYPE."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from testing.placed_models import PATTERNS, demo_windows, measured
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import indexcache  # noqa: F401

folder, output, split, dtype = sys.argv[1:]
shards = DistributedConfig(tp_size=2, ep_size=2) if split == "expert" else DistributedConfig(tp_size=2)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), distributed_config=shards).eval()
assert model.device == torch.device("cuda", dist.get_rank())
found = {}
for pattern in PATTERNS:
    model.set_index_share_pattern(pattern)
    losses, tokens, _ = measured(model, demo_windows())
    found[pattern] = {"losses": [each.tolist() for each in losses], "tokens": tokens.tolist()}
Path(f"{output}.{dist.get_rank()}").write_text(json.dumps(found))
dist.destroy_process_group()
