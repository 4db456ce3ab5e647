"""Several processes that train one dictionary: each takes a part of every batch, and gradients are summed.

Under `torchrun` each process learns its number from the environment. Every process holds the same weights, optimiser
and buffer, so that one alone writes checkpoints and any may read them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor

from qklens.errors import QklensError


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: its number.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch.

        Raises:
            QklensError: the batch cannot be shared out evenly.
        """
        if len(rows) % self.world:
            raise QklensError(f"batch is {len(rows)}, processes are {self.world}; expected a multiple of those")
        size = len(rows) // self.world
        return rows[self.rank * size : (self.rank + 1) * size]

    def add(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def either(self, flags: Tensor) -> Tensor:
        """Whether any process says so, in place."""
        if self.world > 1:
            counts = flags.to(torch.uint8)
            distributed.all_reduce(counts, op=distributed.ReduceOp.MAX)
            flags.copy_(counts.bool())
        return flags

    def gathered(self, values: Tensor) -> Tensor:
        """The numbers of all processes in one row; each may have another count."""
        if self.world == 1:
            return values
        counts = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(self.world)]
        distributed.all_gather(counts, torch.tensor([len(values)], device=values.device))
        longest = max(int(count) for count in counts)
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()


def join_ranks(device: str = "cpu") -> Ranks:
    """This process's place under `torchrun`, `cuda` then being a GPU of its own; one alone where there is none.

    Raises:
        QklensError: as `own_gpu`.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and "RANK" not in os.environ:
        return Ranks()
    if (gpu := own_gpu(device, os.environ, torch.cuda.device_count())) is not None:
        torch.cuda.set_device(gpu)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def own_gpu(device: str, environment: Mapping[str, str], gpus: int) -> int | None:
    """Which GPU is this process's under `torchrun`: the LOCAL_RANK-th of its machine; None where it takes none.

    Args:
        device: as asked for; `cuda` is each process's own.
        environment: of the process.
        gpus: how many the machine has.

    Raises:
        QklensError: one GPU named for all processes, or fewer GPUs than processes.
    """
    if not device.startswith("cuda"):
        return None
    given = environment.get("LOCAL_RANK", "0")
    if device != "cuda" and environment.get("WORLD_SIZE", "1") != "1":
        raise QklensError(f"--device {device}: processes under torchrun take a GPU each; give --device cuda")
    number = device.partition(":")[2] or given
    if not number.isdecimal() or int(number) >= gpus:
        raise QklensError(
            f"--device {device}: process {given} of this machine wants GPU {number}, the machine has {gpus}; give "
            "torchrun no more processes than that, or --device cpu"
        )
    return int(number)


def is_first() -> bool:
    """Whether this process is the one that speaks, as `torchrun` numbers them."""
    return os.environ.get("RANK", "0") == "0"


def leave_ranks() -> None:
    """End what `join_ranks` began."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
