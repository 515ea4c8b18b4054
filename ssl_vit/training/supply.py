"""The micro-batches of the coming steps, fetched before the processes agree to go on, and copied beside the steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.data.bad_samples import BadReport
from ssl_vit.data.loader import Batch
from ssl_vit.data.workers import LoaderFailed


class MicroBatch(NamedTuple):
    """What one forward pass gets.

    Args:
        batch: on the device, bytes as they were read.
        positions: of its samples in the stream, int64 (B,), on the host.
        reports: of its bad samples.
    """

    batch: Batch
    positions: Tensor
    reports: list[BadReport]


class Supply:
    """Has the batches of every step that the processes may still begin.

    A process that finds no batch must not leave the others waiting in the middle of a step: it learns of it early, says
    so, and takes part in the steps until all have heard.

    On a GPU the next micro-batch is copied, on a stream of its own, while the one before it is computed.

    Args:
        loader: micro-batches in order.
        accumulation: of them, a step.
        ahead: steps that may begin before all have heard.
        device: of the training.
    """

    def __init__(
        self, loader: Iterator[tuple[Batch, list[BadReport]]], accumulation: int, ahead: int, device: torch.device
    ) -> None:
        self.accumulation, self.ahead, self.failure, self.device = accumulation, ahead, "", device
        self._loader, self._waiting = loader, deque[tuple[Batch, list[BadReport]]]()
        self._next: MicroBatch | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self) -> None:
        """Fetch what is missing; ``failure`` says why that cannot be done."""
        while len(self._waiting) + (self._next is not None) < self.ahead * self.accumulation and not self.failure:
            try:
                found = next(self._loader, None)
            except LoaderFailed as error:
                self.failure = str(error)
                return
            if found is None:
                return
            self._waiting.append(found)

    def take(self) -> Iterator[MicroBatch]:
        """The micro-batches of the next step, to be used on the current stream."""
        for _ in range(self.accumulation):
            micro = self._next or self._copied()
            if self._copies is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(self._copies)
                for tensor in micro.batch.values():
                    tensor.record_stream(current)
            self._next = self._copied() if self._waiting and self._copies is not None else None
            yield micro

    def _copied(self) -> MicroBatch:
        """The next one that waits, its copy under way."""
        batch, reports = self._waiting.popleft()
        with torch.cuda.stream(self._copies):
            moved = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        return MicroBatch(moved, batch["index"], reports)
