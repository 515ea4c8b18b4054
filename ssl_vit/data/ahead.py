"""Remote shards are downloaded before a lane comes to them: those of its present window, then of its next."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence

from ssl_vit.config import InputError
from ssl_vit.data.index import Index
from ssl_vit.data.order import Stream
from ssl_vit.data.remote import ReadError

logger = logging.getLogger(__name__)


def coming(indexes: Sequence[Index], stream: Stream, position: int, lanes: Iterable[int]) -> list[tuple[int, int]]:
    """What some lanes read at a position and next: (source, shard), each once, the present windows first.

    "Next" is one window, or as many samples as a shard has if that is more. With several sources the place in each is
    that of its share, which is right but for the rows of a block.
    """
    now: list[tuple[int, int]] = []
    later: list[tuple[int, int]] = []
    row = stream.recurring(position) // stream.repeats // stream.num_lanes
    for source, (index, order) in enumerate(zip(indexes, stream.orders, strict=True)):
        own_entry = row * stream.rows[source] // stream.block * stream.num_lanes
        epoch, p = divmod(own_entry, order.epoch_size)
        place, length = p // order.num_lanes, order.lane_length
        start = place - place % order.window
        middle = min(start + order.window, length)
        stop = middle + max(order.window, -(-len(index) // len(index.shards)))
        for lane in lanes if order.num_lanes == stream.num_lanes else range(order.num_lanes):
            present = order.shard_starts(epoch, lane, start, middle)
            after = order.shard_starts(epoch, lane, middle, min(stop, length))
            after += order.shard_starts(epoch + 1, lane, 0, min(stop - length, length))
            now += [(source, index.shard_of(sample)) for sample in present]
            later += [(source, index.shard_of(sample)) for sample in after]
    return list(dict.fromkeys([*now, *later]))


class Ahead:
    """A thread that downloads what is coming, one shard after another; all processes of a node share the work.

    Args:
        indexes: of the sources.
        stream: the order of samples.
        lanes: those that this process reads.
    """

    def __init__(self, indexes: Sequence[Index], stream: Stream, lanes: Sequence[int]) -> None:
        self.indexes, self.stream, self.lanes, self.process = indexes, stream, lanes, os.getpid()
        self._position, self._moved = 0, threading.Event()
        threading.Thread(target=self._run, daemon=True, name="ahead").start()

    def reached(self, position: int) -> None:
        """Say where the process is."""
        self._position = position
        self._moved.set()

    def _run(self) -> None:
        while self._moved.wait():
            self._moved.clear()
            try:
                self._fetch(self._position)
            except (ReadError, InputError) as error:  # who needs the shard says so, if it is still so then
                logger.warning("%s", error)

    def _fetch(self, position: int) -> None:
        wanted = []
        for source, number in coming(self.indexes, self.stream, position, self.lanes):
            shard, cache = self.indexes[source].remote(number), self.indexes[source].cache
            if shard is not None and cache is not None:
                wanted.append((cache, shard))
        keep = {shard.name for _, shard in wanted}
        missing = [(cache, shard) for cache, shard in wanted if not cache.holds(shard)]
        for cache, shard in missing:
            cache.fetch(shard, ahead=True, keep=keep)
            if self._moved.is_set():
                return
