"""Low-rank adapters (LoRA, by peft) in place of the weights that are no indexers': trained, saved alone, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ...runs.errors import RunError

ADAPTERS_FILE = "adapters.safetensors"
_INDEXER_MARK = ".indexer."


def require_peft() -> None:
    """RunError where peft cannot be imported."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise RunError(f"--lora-rank needs peft ({error}): pip install peft") from error


def add_adapters(model: IndexCacheForCausalLM, rank: int) -> None:
    """Put an adapter on every linear layer outside the indexers and the head, in place; its product starts at zero.

    Raises:
        RunError: peft is not installed.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _INDEXER_MARK not in name and module is not model.lm_head
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)


def save_adapters(model: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Write adapters and indexers, which are all that such a run trains; `state` in place of the model's own."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    trained = {name: value.contiguous() for name, value in state.items() if _is_trained(name)}
    save_file(trained, folder / ADAPTERS_FILE)


def load_adapters(model: IndexCacheForCausalLM, folder: Path) -> None:
    """Fill the adapters and indexers of a model that has been through `add_adapters`."""
    path = folder / ADAPTERS_FILE
    try:
        found = model.load_state_dict(load_file(path), strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise RunError(f"{path} cannot be read into this model: {error}") from error
    if found.unexpected_keys:
        raise RunError(f"{path} was made for another model: it holds {found.unexpected_keys[0]}")
    if lacking := [name for name in found.missing_keys if _is_trained(name)]:
        raise RunError(f"{path} was made for another model: it lacks {lacking[0]}")


def _is_trained(name: str) -> bool:
    return "lora_" in name or _INDEXER_MARK in name


@torch.no_grad()
def merge_adapters(model: IndexCacheForCausalLM) -> None:
    """Add every adapter's product to its layer's weight, and take the adapters off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
