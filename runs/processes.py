"""Several processes on one search: each runs a part of the windows, or all run the shards of one model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """The processes of a search and how they share its work.

    Attributes:
        rank: this process.
        count: all of them.
        split: `windows`: each runs every count-th batch; `tensor`: all run every batch, the model being sharded.
    """

    rank: int = 0
    count: int = 1
    split: Literal["windows", "tensor"] = "windows"

    @classmethod
    def from_environment(cls, split: Literal["windows", "tensor"] = "windows") -> Processes:
        """Join the process group that torchrun or `accelerate launch` describes in the environment, if any."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            if backend == "nccl":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(backend)
        return cls(dist.get_rank(), count, split)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and draws progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()

    def share(self, value: Any) -> Any:
        """The first process's value, everywhere."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def mine(self, batches: range) -> list[int]:
        """The batches that this process runs."""
        if self.split == "tensor":
            return list(batches)
        return list(batches)[self.rank :: self.count]

    def gather(self, table: torch.Tensor) -> torch.Tensor:
        """Add up fp64 tables in which each process has filled its own rows and left the others zero.

        Adding zeros is exact, so the result does not depend on how many processes there are. With a sharded model
        the first process's table is everyone's.
        """
        if self.count == 1:
            return table
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        shared = table.to(device)
        if self.split == "tensor":
            dist.broadcast(shared, 0)
        else:
            dist.all_reduce(shared)
        return shared.to(table.device)
