"""What runs for each operation on a device, and why not a faster backend: for people, and without running anything."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .device_target import DeviceTarget, device_target
from .dispatch import Operation
from .pretended_tensors import pretended_launches
from .triton_support import has_kernels


class Choice(NamedTuple):
    """What runs for one example of an operation.

    Attributes:
        operation: its name.
        folder: of `kernels/`.
        example: what its arguments are typical of: `prefill`, `token`, `training`.
        runs: the backend.
        why_not: of each backend before it.
    """

    operation: str
    folder: str
    example: str
    runs: str
    why_not: dict[str, str]


def operations() -> Iterator[tuple[str, Operation[Any]]]:
    """Every operation of the folders beside this one, with its folder: found in the files, in no list."""
    package = __package__.rpartition(".")[0]
    for path in sorted(Path(__file__).parents[1].glob("*/*.py")):
        for value in vars(import_module(f"{package}.{path.parent.name}.{path.stem}")).values():
            # A file may import another's.
            if isinstance(value, Operation) and value.defined_in == path.stem:
                yield path.parent.name, value


def choices(device: torch.device, target: DeviceTarget | None = None) -> list[Choice]:
    """What runs on `device`, or on a device like `target`, for typical shapes in bf16.

    Tensors have no memory, and nothing is compiled: a backend that will not compile is known by those that have been
    set aside in this process.
    """
    found = list(operations())
    if target is None and device.type == "cuda":
        target = device_target(device)
    if target is None:
        return [choice for folder, operation in found for choice in _choices(folder, operation, device)]
    device = torch.device("cuda", device.index or 0)
    with pretended_launches(target, lambda *_: None):
        return [choice for folder, operation in found for choice in _choices(folder, operation, device)]


def _choices(folder: str, operation: Operation[Any], device: torch.device) -> Iterator[Choice]:
    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device if device.type == "cuda" else "meta")

    if not has_kernels(device) and operation.backends[-1].name != "PyTorch":
        return  # a stage of another operation, which is not reached
    for example, arguments in operation.examples.items():
        yield Choice(operation.name, folder, example, *operation.explain(device, *arguments(new)))
