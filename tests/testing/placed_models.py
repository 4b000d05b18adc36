"""What a model does, wherever it is: losses by prefill and by decoding steps, and greedy tokens with padding."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache

from indexcache.conversion.io.load_source import load_source

DEMO = Path(__file__).parents[2] / "demo"
# All indexers, and a pattern of the demo checkpoint's layers.
PATTERNS = ("F" * 12, "FFSSSSFFSSSS")


def save_demo(folder: Path) -> Path:
    """The demo checkpoint in bf16 as an IndexCache checkpoint, written to `folder`."""
    load_source(DEMO / "dsa_demo", dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def demo_windows(count: int = 2) -> torch.Tensor:
    """Held-out text of the demo checkpoint, int64, (count, 2,049)."""
    tensors = load_file(DEMO / "sample_windows.safetensors")
    return next(value for name, value in tensors.items() if name.endswith("ids"))[:count].long()


def token_losses(logits, targets):
    """Of each token, fp32, flat, on the CPU."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().to(logits.device), reduction="none").cpu()


@torch.inference_mode()
def measured(model, windows):
    """Losses of tokens (a prefill, steps with a dynamic and with a static cache), greedy tokens, and the caches."""
    ids = windows.to(model.device)
    length = min(ids.shape[1] - 1, 1024)
    losses = [token_losses(model(ids[:, :length]).logits, ids[:, 1 : length + 1])]
    start, caches = length - 32, []
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=length + 8)):
        model(ids[:, :start], past_key_values=cache, logits_to_keep=1)
        steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(start, length)]
        losses.append(token_losses(torch.cat(steps, dim=1), ids[:, start + 1 : length + 1]))
        caches.append(cache)
    # One row is padded.
    mask = torch.ones_like(ids[:, :200])
    mask[1, :70] = 0
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    tokens = model.generate(ids[:, :200], attention_mask=mask, **options)[:, 200:].cpu()
    return losses, tokens, caches


def means(losses):
    """A number for each of several tensors."""
    return [each.mean().item() for each in losses]
