"""From views to batches: worker processes, the copy to the device and the normalisation there.

The training set is a map-style dataset whose item i is the i-th micro-batch of this process, so neither the number of
workers nor prefetching can change what a step sees.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_vit.config import InputError
from ssl_vit.data.ahead import Ahead
from ssl_vit.data.bad_samples import BadReport
from ssl_vit.data.channels import normalised
from ssl_vit.data.collating import Batch, stack
from ssl_vit.data.decode import BadSample, decode
from ssl_vit.data.index import Index
from ssl_vit.data.order import Stream, derive_seed, rank_positions, replacement_positions
from ssl_vit.data.reader import Reader
from ssl_vit.data.views import seed_generators
from ssl_vit.data.workers import STALL, WatchedBatches

View = Callable[[dict[str, Any]], dict[str, Tensor]]

NORMALISED = ("image", "global_views", "local_views")
VIEW_SEED, STEP_SEED = 1, 2


@dataclass(frozen=True)
class Pixels:
    """How bytes become pixels and pixels become numbers, the same in training, evaluation and export.

    Args:
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        in_chans: channels of a decoded image.
        crop_pct: share of the shorter side that evaluation's centre crop keeps.
        interpolation: evaluation's resize filter.
        max_pixels: larger images are bad samples.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_chans: int = 3
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    max_pixels: int = 178_956_970

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Copy a uint8 batch to the device and normalise its images there, in float32."""
        return self.normalised({key: value.to(device, non_blocking=True) for key, value in batch.items()})

    def normalised(self, batch: Batch) -> Batch:
        """A uint8 batch with its images in float32, computed where it is."""
        batch = dict(batch)
        for key in NORMALISED:
            if key in batch:
                batch[key] = normalised(batch[key].float() / 255, self.mean, self.std)
        return batch


@dataclass
class TrainBatches(Dataset):
    """Item i is micro-batch i of this process: a dict of stacked tensors, and reports of bad samples.

    Args:
        indexes: one index a source, in the order of the stream's sources.
        stream: the order of samples.
        view: sample -> dict of tensors.
        pixels: decoding limits.
        seed: of the run; the seed of a view is (run seed, position).
        batch_size: global, over all processes and micro-batches.
        micro_batch_size: of this process.
        rank: of this process.
        num_ranks: number of processes.
        on_bad: ``"skip"`` replaces a sample that does not decode, ``"stop"`` raises.
    """

    indexes: Sequence[Index]
    stream: Stream
    view: View
    pixels: Pixels
    seed: int
    batch_size: int
    micro_batch_size: int
    rank: int = 0
    num_ranks: int = 1
    on_bad: str = "skip"
    readers: list[Reader] = field(init=False)
    reading: MutableSequence[int] = field(init=False, default_factory=lambda: [0, -1])

    def __post_init__(self) -> None:
        self.readers = [Reader(index) for index in self.indexes]
        self.stack: Callable[[Sequence[Batch]], Batch] = stack
        self.ahead: Ahead | None = None
        self.looks_ahead = any(index.cache and index.remote(0) for index in self.indexes)
        self.accumulation = self.batch_size // self.num_ranks // self.micro_batch_size
        assert self.accumulation * self.micro_batch_size * self.num_ranks == self.batch_size

    def positions(self, item: int) -> list[int]:
        """The stream positions of micro-batch ``item``."""
        step, micro = divmod(item, self.accumulation)
        mine = rank_positions(step, self.rank, self.num_ranks, self.batch_size, self.stream.num_lanes)
        return [int(p) for p in mine[micro * self.micro_batch_size : (micro + 1) * self.micro_batch_size]]

    def lanes(self) -> list[int]:
        """The lanes that this process reads."""
        num_lanes = self.stream.num_lanes
        if num_lanes % self.num_ranks or self.batch_size % num_lanes or self.stream.repeats > 1:
            return list(range(num_lanes))
        mine = rank_positions(0, self.rank, self.num_ranks, self.batch_size, num_lanes)
        return sorted({int(position) % num_lanes for position in mine})

    def names(self, positions: Iterable[int]) -> list[str]:
        """What people call the samples at some positions."""
        found = (self.stream.locate(position) for position in positions)
        return [self.name(source, sample) for source, sample in found]

    def name(self, source: int, sample: int) -> str:
        """What people call a sample."""
        return self.indexes[source].describe(sample)

    def names_of_step(self, step: int) -> list[str]:
        """The samples of the whole global batch of a step, counted from 1."""
        return self.names(range((step - 1) * self.batch_size, step * self.batch_size))

    def __getitem__(self, item: int) -> tuple[Batch, list[BadReport]]:
        """Read, decode and view one micro-batch."""
        reports: list[BadReport] = []
        positions = self.positions(item)
        if self.looks_ahead:
            if self.ahead is None or self.ahead.process != os.getpid():
                self.ahead = Ahead(self.indexes, self.stream, self.lanes())
            self.ahead.reached(positions[0])
        views = [self.view_at(position, reports) for position in positions]
        return self.stack(views), reports

    def view_at(self, position: int, reports: list[BadReport]) -> dict[str, Tensor]:
        """The view at a position, or of what replaces a bad sample, which is reported."""
        good = len(reports)
        image, label = self._good_image(position, reports)
        recurring = self.stream.recurring(position)
        seed_generators(derive_seed(self.seed, VIEW_SEED, recurring))
        view = self.view({"image": image, "label": label})
        view["index"] = torch.tensor(position)
        if self.stream.period:  # what replaces a bad sample depends on the batch: it does not recur
            view["place"] = torch.tensor(recurring if len(reports) == good else -1)
        return view

    def _good_image(self, position: int, reports: list[BadReport]) -> tuple[Tensor, int]:
        for candidate in chain([position], replacement_positions(position, self.batch_size)):
            source, sample = self.stream.locate(candidate)
            self.reading[0], self.reading[1] = source, sample
            try:
                return _load(self.indexes[source], self.readers[source], sample, self.pixels)
            except BadSample as error:
                name = self.name(source, sample)
                if self.on_bad == "stop":
                    raise InputError(f"{name}: {error}; data.bad_samples=skip replaces such samples") from None
                if candidate == position:
                    reports.append(BadReport(self.indexes[source].root, sample, name, str(error), position))
        step = position // self.batch_size
        raise InputError(f"step {step}: none of the {self.batch_size} samples of the batch decodes; check the data")


@dataclass
class EvalBatches(Dataset):
    """Item i is the i-th batch of this process's share of an evaluation set; bad samples are left out and reported.

    Args:
        index: where the samples are.
        samples: sample numbers of this process, in order.
        view: without randomness, unless there is a seed.
        pixels: decoding limits.
        batch_size: samples a batch.
        seed: of a view with randomness, which becomes a function of it and the sample's number.
    """

    index: Index
    samples: Sequence[int] | np.ndarray
    view: View
    pixels: Pixels
    batch_size: int
    seed: int | None = None

    def __post_init__(self) -> None:
        self.reader = Reader(self.index)
        self.reading: MutableSequence[int] = [0, -1]
        self.stack: Callable[[Sequence[Batch]], Batch] = stack

    def name(self, source: int, sample: int) -> str:
        """What people call a sample."""
        return self.index.describe(sample)

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __getitem__(self, item: int) -> tuple[Batch, list[BadReport]]:
        """One batch, its ``index`` being the places of its samples in ``samples``; it may be empty."""
        reports, views = [], []
        start = item * self.batch_size
        for place in range(start, min(start + self.batch_size, len(self.samples))):
            sample = int(self.samples[place])
            self.reading[1] = sample
            try:
                image, label = _load(self.index, self.reader, sample, self.pixels)
            except BadSample as error:
                reports.append(BadReport(self.index.root, sample, self.index.describe(sample), str(error)))
                continue
            if self.seed is not None:
                seed_generators(derive_seed(self.seed, VIEW_SEED, sample))
            view = self.view({"image": image, "label": label})
            view["index"] = torch.tensor(place)
            views.append(view)
        return self.stack(views), reports


def _load(index: Index, reader: Reader, sample: int, pixels: Pixels) -> tuple[Tensor, int]:
    image = decode(reader.read(sample), in_chans=pixels.in_chans, max_pixels=pixels.max_pixels)
    return image, int(index.samples["label"][sample])


def iterate(
    batches: TrainBatches | EvalBatches,
    items: Sequence[int],
    workers: int,
    pin_memory: bool = False,
    stall_timeout: float = STALL,
) -> Iterator[tuple[Batch, list[BadReport]]]:
    """Batches ``items`` in order, read ahead by ``workers`` processes (0: in this process).

    Raises:
        LoaderFailed: on reading, see :class:`~ssl_vit.data.workers.WatchedBatches`.
    """
    return WatchedBatches(batches, items, workers, pin_memory, stall_timeout)
