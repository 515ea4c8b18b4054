"""What reading a run's data takes on a machine: said before the first step, refused if it cannot be had."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_vit.config import InputError
from ssl_vit.data.ahead import coming
from ssl_vit.data.index import Index
from ssl_vit.data.order import Stream
from ssl_vit.data.shard_cache import RemoteShard, ShardCache
from ssl_vit.data.worker_count import cores_of_a_process
from ssl_vit.data.workers import PREFETCH, SLOTS

SHARED_MEMORY = Path("/dev/shm")
KEPT_FREE = 0.1
"""Share of the free disk that a cache leaves to checkpoints."""


@dataclass(frozen=True)
class ReadingPlan:
    """Shards, memory and requests of a run on one machine.

    Args:
        indexes: of the sources.
        stream: the order of samples.
        batch_size: global.
        micro_batch_size: of a process and forward pass.
        num_ranks: processes of the run.
        local_ranks: those on this machine.
        workers: loader processes of each.
        view_bytes: of a sample as the workers hand it over.
        evaluated: what evaluations read.
        eval_images: of their largest set.
        eval_batch_size: of a process and forward pass there.
        eval_view_bytes: of a sample there.
        pinned: whether the batches of workers are copied into pinned memory, as for a GPU.
    """

    indexes: list[Index]
    stream: Stream
    batch_size: int
    micro_batch_size: int
    num_ranks: int
    local_ranks: int
    workers: int
    view_bytes: int
    evaluated: Sequence[Index] = ()
    eval_images: int = 0
    eval_batch_size: int = 1
    eval_view_bytes: int = 0
    pinned: bool = False

    @property
    def batches_ahead(self) -> int:
        """Micro-batches that a process holds at most: those of its workers, and of the steps that may begin."""
        accumulation = self.batch_size // self.num_ranks // self.micro_batch_size
        return self.workers * SLOTS + 2 * accumulation

    @property
    def memory(self) -> int:
        """Bytes of all micro-batches that this machine holds."""
        copies = self.workers * PREFETCH if self.pinned else 0
        return (self.batches_ahead + copies) * self.micro_batch_size * self.view_bytes * self.local_ranks

    @property
    def shared_memory(self) -> int:
        """Bytes that workers hold at most: those of training keep theirs while others read for an evaluation."""
        slots = self.workers * SLOTS
        images = min(slots * self.eval_batch_size, math.ceil(self.eval_images / self.num_ranks))
        return self.local_ranks * (slots * self.micro_batch_size * self.view_bytes + images * self.eval_view_bytes)

    def check(self, position: int = 0) -> None:
        """Refuse what would fail later.

        Args:
            position: of the stream, from which on is read.

        Raises:
            InputError: shared memory or disk is too small.
        """
        if self.workers and SHARED_MEMORY.is_dir():
            free = shutil.disk_usage(SHARED_MEMORY).free
            if self.shared_memory > free:
                raise InputError(
                    f"run.workers={self.workers}: {_gb(self.shared_memory)} of batches made ahead do not fit into "
                    f"{SHARED_MEMORY}, where {_gb(free)} are free; enlarge it (docker run --shm-size="
                    f"{math.ceil(self.shared_memory / 1e9) + 1}g), or lower run.workers, run.micro_batch_size or "
                    "run.eval_batch_size"
                )
        shards = remote_shards([*self.indexes, *self.evaluated])
        cache = next((index.cache for index in [*self.indexes, *self.evaluated] if index.cache), None)
        if shards and cache is not None:
            self._check_cache(cache, shards, position)

    def _check_cache(self, cache: ShardCache, shards: set[RemoteShard], position: int) -> None:
        total = sum(shard.filesize for shard in shards)
        cache.check_room(max(shards, key=lambda shard: shard.filesize))
        lanes = range(max(self.stream.num_lanes * self.local_ranks // self.num_ranks, 1))
        read = {self.indexes[s].remote(n) for s, n in coming(self.indexes, self.stream, position, lanes)}
        at_a_time = sum(shard.filesize for shard in read if shard is not None)
        if cache.limit is not None and cache.limit < at_a_time:
            raise InputError(
                f"data.cache_size={cache.limit / 1e9:g}: {_gb(at_a_time)} of shards are read at a time, in "
                f"{len(lanes)} lanes; give as much, fewer data.num_lanes, or 0 for a request for each image"
            )
        wanted = min(total, cache.limit or total) - cache.used(shards)
        home = next(folder for folder in (cache.folder, *cache.folder.parents) if folder.exists())
        free = int(shutil.disk_usage(home).free * (1 - KEPT_FREE))
        if wanted > free:
            raise InputError(
                f"{cache.folder}: {_gb(wanted)} of shards are to be kept there, and there is room for {_gb(free)}; set "
                f"data.cache to a larger disk, or data.cache_size={free / 1e9:.1f} (GB)"
            )

    def describe(self, rate: float | None = None) -> list[str]:
        """The lines a person checks.

        Args:
            rate: images/s of a worker, see :func:`worker_rate`.
        """
        count = sum(len(index) for index in self.indexes)
        shares = [rows / self.stream.block for rows in self.stream.rows]
        image = sum(s * index.samples["size"].mean() for s, index in zip(shares, self.indexes, strict=True))
        shards = sum(shard.nsamples > 0 for index in self.indexes for shard in index.shards)
        lines = [
            f"reading: {count} images in {shards} shards, {self.num_ranks} processes x {self.workers} workers x "
            f"{self.stream.num_lanes} lanes, about {_gb(image * self.batch_size)} of images a step",
            f"read ahead: {self.batches_ahead} batches of {_gb(self.micro_batch_size * self.view_bytes)} a process, "
            f"{_gb(self.memory)} on this machine",
        ]
        if rate:
            workers = max(self.workers, 1)
            together = min(workers, cores_of_a_process()) * rate
            lines.append(
                f"loader: a core reads about {rate:.0f} images/s, {workers} workers about {together:.0f}; a process "
                f"(of {self.num_ranks}) whose steps take more needs one worker for every {rate:.0f}"
            )
        remote = remote_shards(self.indexes)
        if remote:
            lines.append(f"remote: {self._remote(remote)}")
        return lines

    def _remote(self, shards: set[RemoteShard]) -> str:
        cache = next((index.cache for index in self.indexes if index.cache), None)
        if cache is None:
            images = sum(index.epoch_size for index in self.stream.orders) * self.stream.repeats
            return f"data.cache_size=0: a request for each image, up to {images} an epoch"
        total = sum(shard.filesize for shard in shards)
        whole = cache.limit is None or cache.limit >= total
        often = "once" if whole else f"each epoch, {_gb(cache.limit or 0)} at a time"
        here = f"{_gb(cache.used(shards))} are there already"
        return f"{len(shards)} shards of {_gb(total)} are read whole into {cache.folder}, {often}; {here}"


def remote_shards(indexes: Iterable[Index]) -> set[RemoteShard]:
    """The remote shards that any sample is read from."""
    return {
        shard
        for index in indexes
        for number in range(len(index.shards))
        if index.shards[number].nsamples and (shard := index.remote(number)) is not None
    }


def view_bytes(view: Callable[[dict[str, Any]], dict[str, Tensor]], in_chans: int) -> int:
    """The bytes of a sample's view, which no image's size changes."""
    with torch.random.fork_rng(devices=[]):
        tensors = view({"image": torch.zeros(in_chans, 64, 64, dtype=torch.uint8), "label": 0})
    return sum(tensor.nbytes for tensor in tensors.values())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
