"""Pack images into shards, once, so that training reads large files in sequence instead of millions of small ones.

Bytes are copied, never re-encoded unless ``resize`` asks for it. The order of all samples is drawn first, over the
sorted source; a part is a piece of that order, so any number of workers, of machines and of interruptions gives the
same bytes for the same source, options and number of parts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ssl_vit.config import InputError, Section, check
from ssl_vit.data.checking import Check, CheckedImage
from ssl_vit.data.decode import MAX_PIXELS
from ssl_vit.data.formats import say
from ssl_vit.data.images import Images, open_images
from ssl_vit.data.index import INDEX
from ssl_vit.data.order import permutation
from ssl_vit.data.processes import cores, spread
from ssl_vit.data.publishing import check_refused, publish
from ssl_vit.data.staging import Record, Staging, some_parts
from ssl_vit.data.tally import Tally, print_summary
from ssl_vit.data.tars import SAMPLE, ShardWriter

_CHUNK = 32  # images that travel from a worker together


class PackOptions(Section):
    """The settings of packing."""

    shuffle: bool = Field(True, description="write the samples in a random order over the whole source")
    seed: int = Field(0, ge=0, description="seed of that order")
    labels: Literal["auto", "none"] = Field("auto", description="none: leave classes out")
    maxcount: int = Field(10_000, gt=0, description="samples in a shard at most")
    maxsize: float = Field(1e9, gt=0, description="a shard is closed when it has this many bytes")
    max_refused: float = Field(0.2, ge=0, le=1, description="share of broken images above which packing fails")
    verify: bool = Field(True, description="decode every image in full; no: only its header")
    resize: int | None = Field(None, ge=8, description="re-encode images whose short side is larger: JPEG, lossy")
    quality: int = Field(90, ge=1, le=100, description="JPEG quality of resize")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="refuse larger images; to be that of data.max_pixels")
    overwrite: bool = Field(False, description="replace a folder of shards that stands at OUT")
    part: str = Field("1/1", description="i/n: pack only the i-th of n parts of the source; the last to end joins them")
    workers: int | None = Field(
        None, ge=1, description="processes that read and decode; default: the cores, or 1 where nothing is decoded"
    )
    image_column: str = Field("", description="hf: the column with the images, where there are several")
    label_column: str = Field("", description="hf: the column with the labels, where there are several")

    def part_of(self) -> tuple[int, int]:
        """The number of the part and of all parts.

        Raises:
            InputError: ``part`` is no such pair.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", self.part)
        part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= part <= parts:
            raise InputError(f"part={self.part!r}: allowed: i/n with i from 1 to n, e.g. part=3/8")
        return part, parts

    def content(self) -> dict[str, Any]:
        """Those settings that decide what the shards hold."""
        return self.model_dump(exclude={"max_refused", "overwrite", "part", "workers"})

    @property
    def processes(self) -> int:
        """Those that read and decode: to hand bytes from one to another takes longer than to look at their headers."""
        return self.workers or (cores() if self.verify or self.resize else 1)


def pack(source: str, out: Path, **options: Any) -> dict[str, Any]:
    """Pack a source of images into the folder ``out``.

    Args:
        source: see :func:`~ssl_vit.data.images.open_images`.
        out: must be absent or empty.
        options: see :class:`PackOptions`.

    Returns:
        Counts ``found, packed, refused, skipped, ignored, repeated, shards, bytes``, the ``modes`` and ``short_sides``
        of the images, ``classes``, and the ``missing`` parts; while there are any, all of this part alone.

    Raises:
        InputError: a bad option or source, a target in the way, nothing packed, or too many images refused.
    """
    settings = check(PackOptions, options)
    check_target(out, settings.overwrite)
    images = open_images(source, settings.labels, settings.image_column, settings.label_column)
    return pack_images(images, source, out, settings)


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a target that holds anything, except shards that are to be replaced.

    Raises:
        InputError: saying what stands in the way and how to go on.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder for the shards")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"{out}: is not empty; choose another folder, or replace its shards with overwrite=yes")
        if not (out / INDEX).exists():
            raise InputError(f"{out}: is not empty and holds no {INDEX}, so overwrite=yes does not delete it")


def pack_images(images: Images, source: str, out: Path, settings: PackOptions) -> dict[str, Any]:
    """Pack opened images, and print what was done; see :func:`pack`."""
    part, parts = settings.part_of()
    staging = Staging(out)
    content = {"fingerprint": images.fingerprint(), **settings.content()}
    staging.open({"parts": parts, "found": len(images), **content})
    began = time.perf_counter()
    with staging.claimed(part):
        looked_at = _pack_part(images, staging, part, settings)
        records = staging.finished(part)
    speed = f"{looked_at / (time.perf_counter() - began):.0f} images/s"
    with staging.finishing() as unpublished:
        missing = staging.missing() if unpublished else []
        if unpublished and not missing:
            records = [record for p in range(1, parts + 1) for record in staging.finished(p)]
        tally = Tally()
        for record in records:
            tally.update(Tally.of(record.tally))
        summary = _summary(tally, records, images, missing)
        print_summary(tally, images, source, settings.resize)
        if unpublished and not missing:
            check_refused(tally, staging, source, settings.max_refused)
            check_target(out, settings.overwrite)  # somebody may have filled it meanwhile
            publish(tally, staging, images.classes)
    what = f"part {part} of {parts}" if missing else str(out)
    say(f"  wrote    {what}: {summary['shards']} shards, {summary['bytes'] / 1e6:.1f} MB, {speed}")
    if missing:
        say(f"  to do    {some_parts(missing, parts)} missing; {out} is there when all are packed")
    return summary


def _pack_part(images: Images, staging: Staging, part: int, settings: PackOptions) -> int:
    """Pack what is not finished of a part, and return how many images that were."""
    span, finished = staging.span(part), staging.finished(part)
    start = finished[-1].stop if finished else span.start
    if finished:
        say(f"{staging.out}: going on after {start - span.start} images in {len(finished)} finished shards")
        if start == span.stop:
            return 0
    # Drawn over the sorted source, so the order does not depend on how the file system lists it.
    order = permutation(len(images), settings.seed) if settings.shuffle else np.arange(len(images))
    check = Check(images, order, settings.verify, settings.resize, settings.quality, settings.max_pixels)
    shard = _Shard(staging, part, len(finished))
    try:
        for image in _in_order(check, range(start, span.stop), settings.processes):
            shard.add(image)
            if shard.tally.packed >= settings.maxcount or shard.size >= settings.maxsize:
                shard = shard.finish(image.position + 1)
        if start == span.stop or shard.tally != Tally():
            shard.finish(span.stop)
    except OSError as error:
        raise InputError(
            f"{staging.out}: cannot be written: {error.strerror or error}; the same command goes on after the last "
            "finished shard"
        ) from None
    return span.stop - start


def _in_order(check: Check, positions: range, workers: int) -> Iterator[CheckedImage]:
    from tqdm import tqdm

    chunks = [positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK)]
    with tqdm(total=len(positions), unit="image", disable=None) as bar:
        for images in spread(check, chunks, workers):
            yield from images
            bar.update(len(images))


class _Shard:
    """The shard that is being filled."""

    def __init__(self, staging: Staging, part: int, number: int) -> None:
        self.staging, self.part, self.number = staging, part, number
        self.tally = Tally()
        self._writer: ShardWriter | None = None

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._writer.size if self._writer else 0

    def add(self, image: CheckedImage) -> None:
        """Write an image that is not refused."""
        self.tally.add(image)
        if image.reason:
            return
        if self._writer is None:
            self._writer = ShardWriter(self.staging.tar(self.part, self.number))
        facts: dict[str, object] = {"path": image.name}
        if image.resized_from:
            facts["resized_from"] = image.resized_from[:2]
        # The place in the whole order is unique, dot-free and ASCII, whatever the source calls its files.
        self._writer.add(f"{image.position:09d}", image.extension, image.data, image.label, facts)

    def finish(self, stop: int) -> _Shard:
        """Close the shard before position ``stop``, and return the next."""
        sha256 = self._writer.close() if self._writer else ""
        samples = np.array(self._writer.samples if self._writer else [], dtype=SAMPLE)
        self.staging.commit(self.part, self.number, Record(stop, self.size, sha256, vars(self.tally)), samples)
        return _Shard(self.staging, self.part, self.number + 1)


def _summary(tally: Tally, records: list[Record], images: Images, missing: list[int]) -> dict[str, Any]:
    return {
        "found": tally.packed + len(tally.refused),
        "packed": tally.packed,
        "refused": len(tally.refused),
        "skipped": len(images.skipped),
        "ignored": len(images.ignored),
        "repeated": len(images.repeated),
        "shards": sum(record.filesize > 0 for record in records),
        "bytes": sum(record.filesize for record in records),
        "modes": dict(tally.modes.most_common()),
        "short_sides": tally.histogram(),
        "classes": images.classes,
        "missing": missing,
    }
