"""Check shards against their index, and every image by decoding it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.config import InputError
from ssl_vit.data.decode import MAX_PIXELS, BadSample, inspect
from ssl_vit.data.index import Index, read_index
from ssl_vit.data.processes import cores, spread
from ssl_vit.data.reader import Reader, ReadError, opened
from ssl_vit.data.remote import is_url
from ssl_vit.data.remote_index import open_remote
from ssl_vit.data.shard_cache import ShardCache
from ssl_vit.data.sources import cache_folder
from ssl_vit.data.tars import scan_shard

_CHUNK = 64  # images that a worker decodes at a time


def verify(source: str | Path, workers: int | None = None, max_pixels: int = MAX_PIXELS) -> list[str]:
    """What is wrong with shards, one line for each finding; an empty list if nothing is.

    Args:
        source: a folder with an index, or a URL. Remote shards are read as in training, each once, through a cache
            that holds few of them and is gone after it.
        workers: processes; None: one a core.
        max_pixels: larger images are bad.

    Raises:
        InputError: the index cannot be read, or a shard is missing or has another size.
        ReadError: a server does not answer.
    """
    index = (
        open_remote(str(source), cache_folder(), None) if is_url(str(source)) else read_index(Path(source).expanduser())
    )
    workers = workers or cores()
    findings: list[str] = []
    if index.classes is not None and int(index.samples["label"].max()) >= len(index.classes):
        findings.append(f"label {index.samples['label'].max()} is beyond the {len(index.classes)} class names")
    shards = range(len(index.shards))
    if not any(index.remote(number) for number in shards):
        samples = range(len(index))
        chunks = [samples[start : start + _CHUNK] for start in samples[::_CHUNK]]
        findings += _found(_CheckShard(index), shards, workers)
        return findings + _found(_CheckImages(Reader(index), max_pixels), chunks, workers)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=cache_folder()) as folder:
        index.cache = ShardCache(Path(folder), (workers + 1) * max(shard.filesize for shard in index.shards))
        return findings + _found(_CheckRemoteShard(index, max_pixels), shards, workers)


def _found(check: Callable[[Any], list[str]], items: Sequence[Any], workers: int) -> list[str]:
    from tqdm import tqdm

    findings: list[str] = []
    sizes = [len(item) if isinstance(item, range) else 1 for item in items]
    with tqdm(total=sum(sizes), unit="shard" if isinstance(items, range) else "image", disable=None) as bar:
        for size, found in zip(sizes, spread(check, items, workers), strict=True):
            findings += found
            bar.update(size)
    return findings


@dataclass
class _CheckShard:
    """Compares a shard, read as a whole, with the index."""

    index: Index

    def __call__(self, number: int) -> list[str]:
        index, shard, path = self.index, self.index.shards[number], self.index.path(number)
        try:
            with opened(index, number) as file:
                path = file.name
                scan = scan_shard(Path(path))
        except (InputError, OSError) as error:
            return [str(error).replace(path, index.path(number))]
        found = []
        if shard.sha256 and scan.sha256 != shard.sha256:
            was = f"sha256 {scan.sha256[:16]}... instead of {shard.sha256[:16]}..."
            found.append(f"{shard.url}: its bytes have changed: {was}")
        if len(scan.samples) != shard.nsamples:
            found.append(f"{shard.url}: holds {len(scan.samples)} samples instead of {shard.nsamples}")
        elif not np.array_equal(scan.samples, index.samples[index.starts[number] : index.starts[number + 1]]):
            found.append(f"{shard.url}: offsets or labels differ from the index; make it anew with pipelines/index.py")
        return found


@dataclass
class _CheckImages:
    """Decodes images."""

    reader: Reader
    max_pixels: int

    def __call__(self, samples: range) -> list[str]:
        found = []
        for sample in samples:
            try:
                inspect(self.reader.read(sample), max_pixels=self.max_pixels)
            except (BadSample, ReadError) as error:
                found.append(f"{self.reader.index.describe(sample)}: {error}")
        return found


@dataclass
class _CheckRemoteShard:
    """Both, while the shard is here."""

    index: Index
    max_pixels: int

    def __call__(self, number: int) -> list[str]:
        samples = range(int(self.index.starts[number]), int(self.index.starts[number + 1]))
        found = _CheckShard(self.index)(number)
        return found or _CheckImages(Reader(self.index), self.max_pixels)(samples)
