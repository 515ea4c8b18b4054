"""The micro-batches of the coming steps, fetched before the processes agree to go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from ssl_vit.data.bad_samples import BadReport
from ssl_vit.data.loader import Batch
from ssl_vit.data.workers import LoaderFailed

MicroBatches = list[tuple[Batch, list[BadReport]]]


class Supply:
    """Has the batches of every step that the processes may still begin.

    A process that finds no batch must not leave the others waiting in the middle of a step: it learns of it early, says
    so, and takes part in the steps until all have heard.

    Args:
        loader: micro-batches in order.
        accumulation: of them, a step.
        ahead: steps that may begin before all have heard.
    """

    def __init__(self, loader: Iterator[tuple[Batch, list[BadReport]]], accumulation: int, ahead: int) -> None:
        self.accumulation, self.ahead, self.failure = accumulation, ahead, ""
        self._loader, self._steps = loader, deque[MicroBatches]()

    def fetch(self) -> None:
        """Fetch what is missing; ``failure`` says why that cannot be done."""
        while len(self._steps) < self.ahead and not self.failure:
            try:
                step = list(islice(self._loader, self.accumulation))
            except LoaderFailed as error:
                self.failure = str(error)
                return
            if not step:
                return
            self._steps.append(step)

    def take(self) -> MicroBatches:
        """The micro-batches of the next step."""
        return self._steps.popleft()
