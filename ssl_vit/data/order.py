"""Which sample stands at which position: the endless order of training, as a pure function.

Nothing here is state. A position leads to its sample by computation alone, so a run resumes at any step, and the
number of ranks, workers and micro-batches cannot change what is trained on.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from ssl_vit.config import InputError

# Each use of the seed draws from a stream of its own.
_SHARDS, _ROTATION, _WINDOW, _BLOCK = range(4)

MAX_BLOCK = 1024
"""Rows of the longest block in which several sources are mixed."""


def derive_seed(*keys: int) -> int:
    """A 64-bit seed from whole numbers >= 0: the same on every machine and with every library version.

    Raises:
        ValueError: a key is negative.
    """
    if any(key < 0 for key in keys):
        raise ValueError(f"seeds are derived from whole numbers >= 0, not from {keys}")
    text = ",".join([str(int(key)) for key in keys])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permutation(size: int, *keys: int) -> np.ndarray:
    """A random order of ``range(size)``, int64, a pure function of ``keys``.

    Sorts raw Philox words: numpy promises that bit stream for good, but not what ``Generator.permutation`` makes of it.
    """
    return np.argsort(np.random.Philox(key=derive_seed(*keys)).random_raw(size), kind="stable")


class _Cached:
    """Base of objects with bounded caches that are left behind when they travel to a worker."""

    def _fill_caches(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_cached")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._fill_caches()


class Order(_Cached):
    """The order of one source's samples, epoch after epoch.

    An epoch permutes the shards, lays them in one line, rotates the line by a random offset, cuts it into
    ``num_lanes`` lanes of equal length and permutes each lane in windows. Entry p of the epoch is sample
    ``p // num_lanes`` of lane ``p % num_lanes``. The rotation moves the cuts, and with them the few samples
    (``N mod num_lanes``) that are left out, even where there is only one shard.

    Args:
        shard_sizes: samples in each shard, in index order; empty shards are allowed.
        seed: the order's seed, >= 0.
        num_lanes: how many places of the source are read side by side; 1 if there are fewer samples than lanes.
        window: samples of a lane that are permuted together: wider mixes more, narrower reads more in sequence.

    Raises:
        InputError: the source is empty.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, num_lanes: int = 64, window: int = 4096) -> None:
        assert num_lanes > 0, num_lanes
        assert window > 0, window
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples == 0:
            raise InputError("the data holds no samples; give a source with at least one image")
        self.seed, self.window = seed, window
        self.num_lanes = num_lanes if self.num_samples >= num_lanes else 1
        self.lane_length = self.num_samples // self.num_lanes
        self.epoch_size = self.lane_length * self.num_lanes
        self._fill_caches()

    def _fill_caches(self) -> None:
        # Two windows of every lane: a step near a border reads from both.
        self._cached_window: Callable[[int, int, int], np.ndarray] = lru_cache(2 * self.num_lanes + 2)(self._window)
        self._cached_line: Callable[[int], tuple[int, list[int], list[int]]] = lru_cache(4)(self._line)

    def _window(self, epoch: int, lane: int, number: int) -> np.ndarray:
        size = min(self.window, self.lane_length - number * self.window)
        return permutation(size, self.seed, _WINDOW, epoch, lane, number).astype(np.int32)

    def _line(self, epoch: int) -> tuple[int, list[int], list[int]]:
        """The offset of the rotation; where each shard of the line ends; what leads from line to sample index."""
        shards = permutation(len(self.shard_sizes), self.seed, _SHARDS, epoch)
        sizes = self.shard_sizes[shards]
        ends = np.cumsum(sizes)
        starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        shifts = starts[shards] - (ends - sizes)
        return derive_seed(self.seed, _ROTATION, epoch) % self.num_samples, ends.tolist(), shifts.tolist()

    def sample(self, entry: int) -> int:
        """The sample (0..N-1, shards concatenated in index order) at an entry of the endless stream."""
        epoch, p = divmod(entry, self.epoch_size)
        place, lane = divmod(p, self.num_lanes)
        number, within = divmod(place, self.window)
        mixed = number * self.window + int(self._cached_window(epoch, lane, number)[within])
        offset, ends, shifts = self._cached_line(epoch)
        at = (lane * self.lane_length + mixed + offset) % self.num_samples
        return at + shifts[bisect_right(ends, at)]

    def shard_starts(self, epoch: int, lane: int, start: int, stop: int) -> list[int]:
        """A sample of each shard that the places ``start`` to ``stop`` of a lane are read from, in reading order."""
        offset, ends, shifts = self._cached_line(epoch)
        found, at, left = [], (lane * self.lane_length + start + offset) % self.num_samples, stop - start
        while left > 0:
            number = bisect_right(ends, at)
            found.append(at + shifts[number])
            left -= ends[number] - at
            at = ends[number] % self.num_samples
        return found


class Stream(_Cached):
    """The endless stream of training positions over one or several sources.

    Rows of ``num_lanes`` positions are dealt to the sources in random blocks; every block holds the same exact number
    of rows of each source, and each source runs its own order at its own pace.

    Args:
        orders: one order per source; those of several sources should have different seeds.
        seed: seed of the dealing, >= 0.
        weights: relative share of each source; None: in proportion to their numbers of samples.
        repeats: how often an entry is seen in a row, each time in another view: position P is copy ``P % repeats`` of
            entry ``P // repeats``.
        fixed_passes: after so many passes the stream begins again, with the same samples in the same views; None: it
            never does.

    Raises:
        InputError: weights that do not fit the sources.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        seed: int,
        weights: Sequence[float] | None = None,
        repeats: int = 1,
        fixed_passes: int | None = None,
    ) -> None:
        assert orders, "a stream needs a source"
        assert repeats > 0, repeats
        self.orders, self.seed, self.repeats = list(orders), seed, repeats
        self.epoch_size = sum(order.epoch_size for order in self.orders)
        self.period = self.epoch_size * repeats * fixed_passes if fixed_passes else None
        self.num_lanes = max(order.num_lanes for order in self.orders)
        self.rows = block_rows(weights or [order.num_samples for order in self.orders])
        if len(self.rows) != len(self.orders):
            raise InputError(
                f"data weights {list(weights or [])}: {len(self.rows)} weights for {len(self.orders)} sources; "
                "give one weight for each source"
            )
        self.block = sum(self.rows)
        self._fill_caches()

    def _fill_caches(self) -> None:
        self._cached_deal: Callable[[int], tuple[list[int], list[int]]] = lru_cache(4)(self._deal)

    def _deal(self, block: int) -> tuple[list[int], list[int]]:
        """Per row of a block: its source, and which row of that source it is."""
        sources = np.repeat(np.arange(len(self.rows)), self.rows)[permutation(self.block, self.seed, _BLOCK, block)]
        own_row = np.empty(self.block, dtype=np.int64)
        for source, count in enumerate(self.rows):
            own_row[sources == source] = np.arange(block * count, (block + 1) * count)
        return sources.tolist(), own_row.tolist()

    def recurring(self, position: int) -> int:
        """The first position with the same sample in the same view: the seed of the view."""
        return position % self.period if self.period else position

    def locate(self, position: int) -> tuple[int, int]:
        """The source (its number) and the sample index in that source at a position of the stream."""
        entry = self.recurring(position) // self.repeats
        if len(self.orders) == 1:
            return 0, self.orders[0].sample(entry)
        row, column = divmod(entry, self.num_lanes)
        block, within = divmod(row, self.block)
        sources, own_rows = self._cached_deal(block)
        source = sources[within]
        return source, self.orders[source].sample(own_rows[within] * self.num_lanes + column)


def block_rows(weights: Sequence[float]) -> list[int]:
    """How many rows of a block each source gets.

    The smallest block that represents the weights exactly, lengthened to 64 rows or more; where that would take more
    than 1024 rows, 1024 rows shared out by largest remainder, at least one for each source.

    Raises:
        InputError: a weight is not a number above 0.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(f"data weights {list(weights)}: allowed: numbers above 0")
    parts = [_fraction(weight) for weight in weights]
    shares = [part / sum(parts) for part in parts]
    exact = math.lcm(*(share.denominator for share in shares))
    if exact <= MAX_BLOCK:
        block = exact * math.ceil(64 / exact)
        return [int(share * block) for share in shares]
    spare = max(MAX_BLOCK, len(shares)) - len(shares)
    rows = [1 + math.floor(share * spare) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (-(shares[i] * spare % 1), i))
    for source in by_remainder[: spare + len(shares) - sum(rows)]:
        rows[source] += 1
    return rows


def _fraction(weight: float) -> Fraction:
    """The fraction a person meant: 0.7 is 7/10, 0.3333333333 is 1/3."""
    simple = Fraction(weight).limit_denominator(MAX_BLOCK)
    return simple if abs(float(simple) - weight) <= 1e-9 * weight else Fraction(weight)


def steps_of(epochs: float, epoch_size: int, batch_size: int) -> int:
    """Steps that cover ``epochs`` epochs: ``ceil(epochs * epoch_size / batch_size)``."""
    # Through the decimal text: in floats 0.1 * 3000 / 100 is a little more than 3.
    return math.ceil(Fraction(repr(float(epochs))) * epoch_size / batch_size)


def rank_positions(step: int, rank: int, num_ranks: int, batch_size: int, num_lanes: int) -> np.ndarray:
    """This rank's positions of the global batch of a step, ascending, int64 ``(batch_size / num_ranks,)``.

    A rank keeps to a block of lanes where the numbers divide, so that it reads few places, each in sequence;
    otherwise it takes its slice of the batch.
    """
    assert batch_size % num_ranks == 0, (batch_size, num_ranks)
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    if num_lanes % num_ranks or batch_size % num_lanes:
        return positions.reshape(num_ranks, -1)[rank]
    return positions.reshape(-1, num_ranks, num_lanes // num_ranks)[:, rank].reshape(-1)


def replacement_positions(position: int, batch_size: int) -> Iterator[int]:
    """The other positions of the same global batch, from the next one on: where to look when a sample is bad."""
    start = position - position % batch_size
    for step in range(1, batch_size):
        yield start + (position - start + step) % batch_size
