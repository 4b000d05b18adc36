"""Run a source checkpoint with transformers' own model and the converted one with ours, on the same tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..configuration.share_pattern import SharePattern
from .checkpoint import DTYPE_BITS, Checkpoint, FolderSource
from .families import INDEXCACHE, source_pattern
from .fp8 import SCALE_SUFFIX

# fp32 on both sides: what is left is the order of summation. Where scores tie at the edge of the top-k it may decide
# which key is chosen, and move a few tokens further; so the median over tokens is judged, which a real error moves.
AGREE_WITHIN = 1e-3
_MAX_TOKENS = 384


def pattern_run_by(checkpoint: Checkpoint) -> SharePattern:
    """The pattern that transformers' own class runs: DeepseekV32ForCausalLM knows no sharing, whatever its config."""
    if checkpoint.config["model_type"] == "deepseek_v32":
        return SharePattern.all_full(checkpoint.config["num_hidden_layers"])
    return source_pattern(checkpoint.config, checkpoint.source.location)


def compare_logits(before: Checkpoint, after: Checkpoint) -> dict[str, Any]:
    """Compare logits in fp32.

    Returns:
        `compared`, and either `max_abs_difference`, `median_abs_difference` (the median over tokens of each token's
        largest), `mean_kl` (nats a token) and `agree`, or the `reason` why the models were not run.
    """
    needed, free = _fp32_bytes(before), _free_memory()
    if free is not None and needed * 1.2 > free:
        return {"compared": False, "reason": f"{needed:,} bytes of fp32 weights do not fit in {free:,} of free memory"}
    tokens = _fixed_tokens(before.config)
    try:
        first = _logits(before, tokens)
        second = _logits(after, tokens)
    # Loading is transformers' business and fails in its own ways: no GPU for fp8, a ragged block, a missing package.
    except Exception as error:
        return {"compared": False, "reason": f"a model did not run: {type(error).__name__}: {str(error)[:300]}"}
    differences = (first - second).abs().amax(-1)  # [tokens]
    first, second = first.log_softmax(-1), second.log_softmax(-1)
    kl = torch.nn.functional.kl_div(second, first, log_target=True, reduction="none").sum(-1).mean().item()
    return {
        "compared": True,
        "tokens": tokens.shape[1],
        "max_abs_difference": differences.max().item(),
        "median_abs_difference": differences.median().item(),
        "mean_kl": kl,
        "agree": differences.median().item() <= AGREE_WITHIN,
    }


def _fixed_tokens(config: dict[str, Any]) -> torch.Tensor:
    """`[1, length]` token ids, the same everywhere, longer than top-k where that is affordable."""
    length = min(3 * config.get("index_topk", 2048), _MAX_TOKENS)
    return (torch.arange(length, dtype=torch.long) ** 2 * 7919 % config["vocab_size"])[None]


def _logits(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM

    assert isinstance(checkpoint.source, FolderSource)
    folder: Path = checkpoint.source.folder
    loader = IndexCacheForCausalLM if checkpoint.config["model_type"] == INDEXCACHE else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens, use_cache=False).logits[0].float()


def _fp32_bytes(checkpoint: Checkpoint) -> int:
    return sum(
        info.nbytes * 32 // DTYPE_BITS[info.dtype]
        for name, info in checkpoint.tensors.items()
        if not name.endswith(SCALE_SUFFIX)
    )


def _free_memory() -> int | None:
    """Bytes of memory that a new process may take; `None` where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
