"""What data and evaluation need of torch.distributed: rank, sums, gathering of uneven parts."""

from __future__ import annotations

import gc
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def shutdown() -> None:
    """Leave the process group, if there is one: every way out of a run does, or its peers wait for nobody."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # what still holds the group would end its threads with the interpreter, which can abort it
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def all_sum(value: Tensor) -> Tensor:
    """Sum of ``value`` over the processes; the argument is left as it is."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def all_max(value: Tensor) -> Tensor:
    """Largest ``value`` over the processes; the argument is left as it is."""
    if world_size() == 1:
        return value
    largest = value.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_objects(value: Value) -> list[Value]:
    """What every process has, in their order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_interleaved(part: Tensor, total: int) -> Tensor:
    """Put back together what was dealt out as item ``i`` to process ``i mod R``.

    Args:
        part: (n_r, ...), the items of this process in ascending order; n_r may differ by one over the processes.
        total: number of items over all processes.

    Returns:
        (total, ...), the same on every process.
    """
    size = world_size()
    if size == 1:
        assert len(part) == total, f"{len(part)} items of {total}"
        return part
    longest = -(-total // size)
    padded = part.new_zeros((longest, *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]
