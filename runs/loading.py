"""Load a checkpoint to be evaluated: where it goes, and in what precision."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration.share_pattern import SharePattern
from ..conversion.io.load_source import load_source
from ..conversion.io.open_checkpoint import OpenedCheckpoint, open_checkpoint
from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from .errors import RunError

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


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

    def __post_init__(self) -> None:
        if self.device is not None:
            check_device(self.device)
        if self.device_map is not None and self.device_map not in DEVICE_MAPS:
            check_device(self.device_map, "--device-map")
        if self.device_map is not None and importlib.util.find_spec("accelerate") is None:
            raise RunError("--device-map needs accelerate: pip install accelerate")


def check_device(name: str, flag: str = "--device") -> torch.device:
    """The device of that name.

    Raises:
        RunError: torch knows none, or this machine has none of it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"{flag} {name!r} is no device that torch knows: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"{flag} {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "meta":
        raise RunError(f"{flag} meta holds no values: give a device that computes")
    return device


def open_model(
    source: str, placement: Placement | None = None, pattern: SharePattern | None = None
) -> OpenedCheckpoint:
    """A DSA or IndexCache checkpoint, found whole from config and headers, without its weights.

    Raises:
        ConversionError: a source that is no DSA checkpoint, or not a whole one.
    """
    placement = placement or Placement()
    return open_checkpoint(source, pattern, revision=placement.revision, token=placement.token)


def dtype_and_device(placement: Placement) -> tuple[torch.dtype, str]:
    """What `auto` and no device mean on this machine: the dtype of weights, and where a model on one device goes."""
    on_cuda = torch.cuda.is_available() and not (placement.device or "").startswith("cpu")
    automatic = torch.bfloat16 if on_cuda else torch.float32
    dtype: torch.dtype = automatic if placement.dtype == "auto" else getattr(torch, placement.dtype)
    return dtype, placement.device or (f"cuda:{torch.cuda.current_device()}" if on_cuda else "cpu")


def load_model(source: str | OpenedCheckpoint, placement: Placement | None = None) -> IndexCacheForCausalLM:
    """A DSA or IndexCache checkpoint as an IndexCache model in evaluation mode.

    Raises:
        ConversionError: as `load_source`.
    """
    placement = placement or Placement()
    opened = open_model(source, placement) if isinstance(source, str) else source
    dtype, device = dtype_and_device(placement)
    arguments: dict[str, Any] = {"dtype": dtype, "token": placement.token}
    if placement.tensor_parallel:
        arguments["tp_plan"] = "auto"
    elif placement.device_map:
        arguments["device_map"] = placement.device_map
    model = load_source(opened, **arguments)
    if not (placement.tensor_parallel or placement.device_map):
        model.to(device)  # type: ignore[arg-type]
    model.eval()  # type: ignore[no-untyped-call]
    return model
