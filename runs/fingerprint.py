"""Hashes that identify models by their content, wherever the weights lie and however the files are cut."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM

# Of a tensor so many elements at most enter the hash, evenly spaced.
SAMPLED_ELEMENTS = 2**18
# Of the config, what does not change what the model computes.
_UNRELATED = frozenset({"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"})


def model_sha256(model: IndexCacheForCausalLM) -> str:
    """A hash of the config, and of every parameter's and buffer's name, shape, dtype and up to 2**18 elements.

    Weights that a device map has put on disk enter by name and shape only.
    """
    digest = _of_config(model)
    for name, tensor in sorted(model.state_dict().items()):
        for part in tensor_print(name, tensor):
            digest.update(part)
    return digest.hexdigest()


def sha256_of_prints(model: IndexCacheForCausalLM, prints: dict[str, list[bytes]]) -> str:
    """`model_sha256` of a model that is never whole in memory, from its config and the `tensor_print` of each name."""
    digest = _of_config(model)
    for _, parts in sorted(prints.items()):
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


def tensor_print(name: str, tensor: torch.Tensor) -> list[bytes]:
    """What of a tensor enters the hash."""
    parts = [f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()]
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.device.type == "meta" or local.numel() == 0:
        return parts
    flat = local.detach().flatten()
    sample = flat[:: max(1, -(-flat.numel() // SAMPLED_ELEMENTS))].contiguous().cpu()
    return [*parts, sample.view(torch.uint8).numpy().tobytes()]


def _of_config(model: IndexCacheForCausalLM) -> hashlib._Hash:
    fields: dict[str, Any] = {name: value for name, value in model.config.to_dict().items() if name not in _UNRELATED}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
