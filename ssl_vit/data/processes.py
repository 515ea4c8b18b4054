"""Work spread over processes, its results in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ssl_vit.config import InputError
from ssl_vit.data.workers import begin_worker, start_workers

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def spread(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """``function(item)`` of all items in their order, a few ahead, by worker processes that end with this one.

    Processes, not threads: most formats are decoded under one lock (Pillow's settings), small images under the
    interpreter's.

    Args:
        function: what to do; travels to the workers.
        items: what to do it with.
        workers: processes; with one, or one item, the work is done in this process.

    Raises:
        InputError: as ``function`` raised it; or a worker was killed.
    """
    workers = min(workers, len(items))
    if workers < 2:
        yield from map(function, items)
        return
    loader = DataLoader(
        _Calls(function, items),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=begin_worker,
        prefetch_factor=2,
        generator=torch.Generator(),  # its seed must not be drawn from anybody's stream
    )
    iterator = start_workers(loader)
    try:
        for result in iterator:
            if isinstance(result, InputError):
                raise result
            yield result
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        cure = "most often for want of memory: give fewer with workers=..."
        raise InputError(f"a worker process was killed ({' '.join(str(error).split())}), {cure}") from None
    finally:
        del iterator  # ends the workers now; an error's traceback would keep them


class _Calls(Dataset):
    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.function(self.items[number])
        except InputError as error:  # raised there, it would come back with a worker's traceback as its message
            return error


def _unchanged(result: Any) -> Any:
    return result
