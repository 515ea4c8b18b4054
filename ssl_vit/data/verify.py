"""Check shards against their index, and every image by decoding it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_vit.config import InputError
from ssl_vit.data.index import Index, read_index
from ssl_vit.data.processes import cores, spread
from ssl_vit.data.reader import Reader, ReadError
from ssl_vit.data.tars import scan_shard

_CHUNK = 64  # images that a worker decodes at a time


def verify(folder: Path, workers: int | None = None) -> list[str]:
    """What is wrong with a folder of shards, one line for each finding; an empty list if nothing is.

    Args:
        folder: with its index.
        workers: processes; None: one a core.

    Raises:
        InputError: the index cannot be read, or a shard is missing or has another size.
    """
    from tqdm import tqdm

    index = read_index(folder)
    workers = workers or cores()
    findings: list[str] = []
    with tqdm(total=len(index.shards), unit="shard", disable=None) as bar:
        for found in spread(_CheckShard(index), range(len(index.shards)), workers):
            findings += found
            bar.update()
    if index.classes is not None and int(index.samples["label"].max()) >= len(index.classes):
        findings.append(f"label {index.samples['label'].max()} is beyond the {len(index.classes)} class names")
    samples = range(len(index))
    chunks = [samples[start : start + _CHUNK] for start in samples[::_CHUNK]]
    with tqdm(total=len(index), unit="image", disable=None) as bar:
        for chunk, found in zip(chunks, spread(_CheckImages(Reader(index)), chunks, workers), strict=True):
            findings += found
            bar.update(len(chunk))
    return findings


@dataclass
class _CheckShard:
    """Compares a shard, read as a whole, with the index."""

    index: Index

    def __call__(self, number: int) -> list[str]:
        index, shard = self.index, self.index.shards[number]
        try:
            scan = scan_shard(Path(index.path(number)))
        except InputError as error:
            return [str(error)]
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

    def __call__(self, samples: range) -> list[str]:
        from ssl_vit.data.decode import BadSample, inspect

        found = []
        for sample in samples:
            try:
                inspect(self.reader.read(sample))
            except (BadSample, ReadError) as error:
                found.append(f"{self.reader.index.describe(sample)}: {error}")
        return found
