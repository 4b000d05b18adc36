"""Run a source's weights with transformers' own model and the converted ones with ours, on the same tokens.

Both run the converted checkpoint's pattern: transformers' GLM class knows sharing, and into its DeepSeek-V3.2 class,
which does not, it is put from outside. The tokens are more than the indexers select, so that selection decides.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...configuration.configuration_indexcache import PATTERN_FIELDS
from ...configuration.hub_code import AUTO_MAP
from ...configuration.share_pattern import SharePattern
from ..convert.families import INDEXCACHE, LOCAL_FIELDS, convert_config, layer_of, load_config
from ..io.checkpoint import DTYPE_BITS, FLOAT_DTYPES, Checkpoint
from ..io.fp8 import FP8, SCALE_SUFFIX, fp8_block_size
from ..io.sources import ConversionError, FolderSource
from ..io.tensor_stream import OpenShards, PlannedTensor, tensor_blocks

# fp32 on both sides: what is left is the order of summation. Where scores tie at the edge of the top-k it may decide
# which key is chosen, and move a few tokens further; so the median over tokens is judged, which a real error moves.
AGREE_WITHIN = 1e-3
_MAX_TOKENS = 384
# What the indexers select where the config's own number leaves no room for a selection in so many tokens.
_LOWERED_TOPK = 128


def compare_logits(before: Checkpoint, after: Checkpoint, pattern: SharePattern) -> dict[str, Any]:
    """Compare logits in fp32.

    Args:
        before: the source, in a folder.
        after: what was made of it, in a folder.
        pattern: that `after` runs, and that the source's weights are run with.

    Returns:
        `compared`, and either `reference` (which class ran the source's weights, and `reference_note`, why no other),
        `tokens`, `index_topk` (and `index_topk_lowered_from`, where it was lowered on both sides),
        `max_abs_difference`, `median_abs_difference` (the median over tokens of each token's largest), `mean_kl`
        (nats a token) and `agree`; or the `reason` why the models were not run; or `failed`, why the converted one
        does not run.
    """
    needed, free = bytes_to_run(before), free_memory()
    if free is not None and needed > free:
        return _not_compared(f"{needed:,} bytes are needed to run it in fp32, and {free:,} of memory are free")
    topk, lowered_from = _topk_to_run(before.config)
    tokens = _fixed_tokens(before.tensors["model.embed_tokens.weight"].shape[0], topk)
    found: dict[str, Any] = {"compared": True, "tokens": tokens.shape[1], "index_topk": topk}
    if lowered_from is not None:
        found["index_topk_lowered_from"] = lowered_from
    with quiet_transformers():
        try:
            first, found["reference"], note = _reference_logits(before, pattern, topk, tokens)
        # Loading is transformers' business and fails in its own ways: a ragged block, a missing package, memory.
        except Exception as error:
            return _not_compared(f"the source does not run here: {_brief(error)}")
        if note is not None:
            found["reference_note"] = note
        try:
            second = _our_logits(after, None, topk, tokens)
        except Exception as error:
            if _lacks_memory(error):
                return _not_compared(f"the converted checkpoint does not fit here: {_brief(error)}")
            return {**_not_compared("the converted checkpoint does not run"), "failed": _brief(error)}
    differences = (first - second).abs().amax(-1)  # [tokens]
    first, second = first.log_softmax(-1), second.log_softmax(-1)
    kl = torch.nn.functional.kl_div(second, first, log_target=True, reduction="none").sum(-1).mean().item()
    median = differences.median().item()
    return found | {
        "max_abs_difference": differences.max().item(),
        "median_abs_difference": median,
        "mean_kl": kl,
        # NaN agrees with nothing
        "agree": median <= AGREE_WITHIN,
    }


def _not_compared(reason: str) -> dict[str, Any]:
    return {"compared": False, "reason": reason}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _lacks_memory(error: Exception) -> bool:
    """Whether an allocation failed, which torch reports on a CPU as a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _topk_to_run(config: dict[str, Any]) -> tuple[int, int | None]:
    """The top-k to run with, and the config's own where that is too much for a selection within `_MAX_TOKENS`."""
    topk = config.get("index_topk", 2048)
    return (topk, None) if topk * 3 <= _MAX_TOKENS * 2 else (_LOWERED_TOPK, topk)


def _fixed_tokens(vocab_size: int, topk: int) -> torch.Tensor:
    """`[1, length]` token ids, the same everywhere, more than top-k."""
    length = min(3 * topk, _MAX_TOKENS)
    return (torch.arange(length, dtype=torch.long) ** 2 * 7919 % vocab_size)[None]


# ---- the two models -------------------------------------------------------------------------------------------------


def _reference_logits(
    before: Checkpoint, pattern: SharePattern, topk: int, tokens: torch.Tensor
) -> tuple[torch.Tensor, str, str | None]:
    """The source's logits `[tokens, vocabulary]` under `pattern`; which class gave them; why not transformers' own."""
    if before.config["model_type"] == INDEXCACHE:
        note = "transformers has no class of its own for an IndexCache source"
    else:
        try:
            model = _native_model(before, pattern, topk)
            return _logits(model, tokens), type(model).__name__, None
        except Exception as error:
            if _lacks_memory(error):
                raise
            note = f"transformers' own class does not run the source: {_brief(error)}"
    return _our_logits(before, pattern, topk, tokens), "IndexCacheForCausalLM", note


def _our_logits(checkpoint: Checkpoint, pattern: SharePattern | None, topk: int, tokens: torch.Tensor) -> torch.Tensor:
    """A checkpoint's logits with our class; a DSA source is run with `pattern`."""
    from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM

    location, fields = checkpoint.source.location, checkpoint.config
    if pattern is not None:
        fields = convert_config(fields, pattern, None, AUTO_MAP, location)
    config = load_config({**_runnable(fields), "index_topk": topk}, location)
    return _logits(_load(IndexCacheForCausalLM, checkpoint, config), tokens)


def _native_model(before: Checkpoint, pattern: SharePattern, topk: int) -> Any:
    """Transformers' own model of the source, running `pattern`."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = before.config["model_type"]
    fields = {name: value for name, value in _runnable(before.config).items() if name not in PATTERN_FIELDS}
    shares = hasattr(CONFIG_MAPPING[model_type], "indexer_types")
    if shares:
        fields["indexer_types"] = pattern.indexer_types
    config = CONFIG_MAPPING[model_type].from_dict({**fields, "index_topk": topk})
    model = _load(AutoModelForCausalLM, before, config)
    if not shares:
        _share_from_outside(model, pattern)
    return model


def _share_from_outside(model: Any, pattern: SharePattern) -> None:
    """Make the shared layers of a model without sharing take the selection of the full layer before them."""
    last: dict[str, torch.Tensor] = {}

    def remember(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        last["selection"] = output

    for layer, block in enumerate(model.model.layers):
        if pattern.is_full(layer):
            block.self_attn.indexer.register_forward_hook(remember)
        else:
            block.self_attn.indexer = _EarlierSelection(last)


class _EarlierSelection(nn.Module):
    """Stands where a shared layer's indexer was."""

    def __init__(self, last: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._last = last

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._last["selection"]


def _runnable(fields: dict[str, Any]) -> dict[str, Any]:
    """Config fields without the owner's code, and for weights that have been dequantised."""
    removed = LOCAL_FIELDS | {"auto_map", "quantization_config"}
    return copy.deepcopy({name: value for name, value in fields.items() if name not in removed})


def _load(loader: Any, checkpoint: Checkpoint, config: Any) -> Any:
    """A model in fp32. Weights in fp8 are dequantised here: transformers wants a GPU or even blocks for them."""
    assert isinstance(checkpoint.source, FolderSource)
    arguments: dict[str, Any] = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    if fp8_block_size(checkpoint.config, checkpoint.source.location) is None:
        model, info = loader.from_pretrained(checkpoint.source.folder, **arguments)
    else:
        native = loader if not hasattr(loader, "_model_mapping") else loader._model_mapping[type(config)]
        model, info = native.from_pretrained(None, state_dict=_fp32_weights(checkpoint), **arguments)
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        raise ConversionError(f"{checkpoint.source.location} lacks weights of {type(model).__name__}: {lacking[:5]}")
    return model.eval()


def _fp32_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights of all decoder layers, MTP layers left out, in fp32."""
    block_size = fp8_block_size(checkpoint.config, checkpoint.source.location)
    layers, tensors, weights = checkpoint.config["num_hidden_layers"], checkpoint.tensors, {}
    held = OpenShards(checkpoint.source)
    try:
        for file, shard in checkpoint.shards.items():
            held.hold([file])
            for name, info in shard.tensors.items():
                place = layer_of(name)
                if name.endswith(SCALE_SUFFIX) or (place and place[0] >= layers):
                    continue
                scale = tensors.get(name + SCALE_SUFFIX) if info.dtype == FP8 else None
                planned = PlannedTensor(info, "F32", scale, block_size if scale else None)
                value = torch.empty(info.shape)
                _fill(value, tensor_blocks(planned, held))
                weights[name] = value
    finally:
        held.abandon()
    return weights


def _fill(value: torch.Tensor, blocks: Iterator[memoryview | bytes]) -> None:
    target, offset = value.view(-1).numpy().view(np.uint8), 0
    for block in blocks:
        target[offset : offset + len(block)] = np.frombuffer(block, dtype=np.uint8)
        offset += len(block)


def _logits(model: Callable[..., Any], tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, use_cache=False).logits[0].float()
    return logits


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and reports: MTP layers and shared indexers are surplus here on purpose."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---- memory ---------------------------------------------------------------------------------------------------------


def bytes_to_run(checkpoint: Checkpoint) -> int:
    """Bytes of one model in fp32 and of what loading takes beside it: dequantised weights are there twice."""
    wide = sum(
        info.nbytes * 32 // DTYPE_BITS[info.dtype]
        for name, info in checkpoint.tensors.items()
        if not name.endswith(SCALE_SUFFIX)
    )
    quantised = any(info.dtype not in FLOAT_DTYPES for info in checkpoint.tensors.values())
    return int(wide * (2.2 if quantised else 1.2))


def free_memory() -> int | None:
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
