"""Hashes that identify models by their content, wherever the weights lie and however the files are cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
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
    return state_sha256(model, sorted(model.state_dict().items()))


def state_sha256(model: IndexCacheForCausalLM, state: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`model_sha256` of a model whose weights come one after the other, sorted by name."""
    fields: dict[str, Any] = {name: value for name, value in model.config.to_dict().items() if name not in _UNRELATED}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, tensor in state:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.device.type == "meta" or local.numel() == 0:
            continue
        flat = local.detach().flatten()
        sample = flat[:: max(1, -(-flat.numel() // SAMPLED_ELEMENTS))].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
