"""Check shards against their index, and every image by decoding it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ssl_vit.config import InputError
from ssl_vit.data.index import Index, read_index
from ssl_vit.data.reader import Reader, ReadError
from ssl_vit.data.tars import scan_shard


def verify(folder: Path, workers: int = 2) -> list[str]:
    """What is wrong with a folder of shards, one line for each finding; an empty list if nothing is.

    Raises:
        InputError: the index cannot be read, or a shard is missing or has another size.
    """
    from tqdm import tqdm

    index = read_index(folder)
    findings = [line for shard in range(len(index.shards)) for line in _check_shard(index, shard)]
    if index.classes is not None and int(index.samples["label"].max()) >= len(index.classes):
        findings.append(f"label {index.samples['label'].max()} is beyond the {len(index.classes)} class names")
    reader = Reader(index)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(index), unit="image", disable=None) as bar:
        starts = range(0, len(index), 64)
        for found in pool.map(lambda start: list(_check_images(reader, start, start + 64)), starts):
            findings += found
            bar.update(64)
    return findings


def _check_shard(index: Index, number: int) -> Iterator[str]:
    shard = index.shards[number]
    try:
        scan = scan_shard(Path(index.path(number)))
    except InputError as error:
        yield str(error)
        return
    if shard.sha256 and scan.sha256 != shard.sha256:
        yield f"{shard.url}: its bytes have changed: sha256 {scan.sha256[:16]}... instead of {shard.sha256[:16]}..."
    if len(scan.samples) != shard.nsamples:
        yield f"{shard.url}: holds {len(scan.samples)} samples instead of {shard.nsamples}"
    elif not np.array_equal(scan.samples, index.samples[index.starts[number] : index.starts[number + 1]]):
        yield f"{shard.url}: offsets or labels differ from the index; make it anew with pipelines/index.py"


def _check_images(reader: Reader, start: int, stop: int) -> Iterator[str]:
    from ssl_vit.data.decode import BadSample, inspect

    for sample in range(start, min(stop, len(reader.index))):
        try:
            inspect(reader.read(sample))
        except (BadSample, ReadError) as error:
            yield f"{reader.index.describe(sample)}: {error}"
