"""The micro-batches of the coming steps, fetched before the processes agree to go on, and copied beside the steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

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
        self._waits: list[tuple[Any, Any]] = []

    def fetch(self) -> None:
        """Fetch what is missing; ``failure`` says why that cannot be done."""
        start = self._mark()
        self._fill()
        self._waits.append((start, self._mark()))

    def waited(self) -> float:
        """Seconds that steps waited for batches since this was asked last.

        On a GPU those in which it had nothing to do, once it has done all that was asked: the host, which is ahead, may
        wait while the GPU works.
        """
        waits, self._waits = self._waits, []
        if self._copies is None:
            return sum(end - start for start, end in waits)
        return sum(start.elapsed_time(end) for start, end in waits) / 1000

    def _mark(self) -> Any:
        if self._copies is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _fill(self) -> None:
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
        with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
            moved = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        return MicroBatch(moved, batch["index"], reports)
