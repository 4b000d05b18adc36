"""Load a checkpoint to be evaluated: where it goes, and in what precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..configuration.configuration_indexcache import IndexCacheConfig
from ..conversion.bundle import AUTO_MAP
from ..conversion.families import convert_config, load_config
from ..conversion.load_source import load_source
from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM


@dataclass(frozen=True)
class Placement:
    """Where a model goes and how it is fetched.

    Attributes:
        dtype: `auto` (bf16 on CUDA, fp32 elsewhere) or torch's name of one.
        device: where the model goes; None for the GPU where there is one.
        device_map: of accelerate (`auto`, ...), in place of `device`.
        tensor_parallel: shard the model over the processes of torchrun.
        revision: of a Hub source.
        token: for the Hub.
    """

    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    tensor_parallel: bool = False
    revision: str | None = None
    token: str | None = None


def load_model(source: str, placement: Placement | None = None) -> IndexCacheForCausalLM:
    """A DSA or IndexCache checkpoint as an IndexCache model in evaluation mode."""
    placement = placement or Placement()
    on_cuda = torch.cuda.is_available() and not (placement.device or "").startswith("cpu")
    automatic = torch.bfloat16 if on_cuda else torch.float32
    arguments: dict[str, Any] = {
        "dtype": automatic if placement.dtype == "auto" else getattr(torch, placement.dtype),
        "revision": placement.revision,
        "token": placement.token,
    }
    if placement.tensor_parallel:
        return load_source(source, tp_plan="auto", **arguments).eval()
    if placement.device_map:
        return load_source(source, device_map=placement.device_map, **arguments).eval()
    local = f"cuda:{torch.cuda.current_device()}" if on_cuda else "cpu"
    return load_source(source, **arguments).to(placement.device or local).eval()  # type: ignore[arg-type]


def read_config(source: str, placement: Placement | None = None) -> IndexCacheConfig:
    """The config of a DSA or IndexCache checkpoint, without its weights.

    Raises:
        ConversionError: a source that is no DSA checkpoint.
    """
    placement = placement or Placement()
    fields, _ = PreTrainedConfig.get_config_dict(source, revision=placement.revision, token=placement.token)
    return load_config(convert_config(fields, None, None, AUTO_MAP, source), source)
