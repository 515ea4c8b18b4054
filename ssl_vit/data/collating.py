"""From the views of single samples to one batch, in memory that is used again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def stack(views: Sequence[Batch]) -> Batch:
    """One tensor a key, the samples along a new first axis; of no views no keys."""
    return {key: torch.stack([view[key] for view in views]) for key in (views[0] if views else ())}


class SharedSlots:
    """Stacks into shared memory, batch after batch into the same few places in turn.

    Fresh pages of shared memory cost system time (BENCHMARKS.md, loaders). A batch is overwritten when ``count``
    more have been stacked: whoever receives it has copied it by then.

    Args:
        count: places.
    """

    def __init__(self, count: int) -> None:
        self.slots: list[Batch] = [{} for _ in range(count)]
        self.next = 0

    def __call__(self, views: Sequence[Batch]) -> Batch:
        """As :func:`stack`."""
        if not views:
            return {}
        slot = self.slots[self.next]
        self.next = (self.next + 1) % len(self.slots)
        for key, first in views[0].items():
            shape = (len(views), *first.shape)
            if key not in slot or slot[key].shape != shape or slot[key].dtype != first.dtype:
                slot[key] = torch.empty(shape, dtype=first.dtype).share_memory_()
            torch.stack([view[key] for view in views], out=slot[key])
        return {key: slot[key] for key in views[0]}
