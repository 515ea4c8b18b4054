"""Pack images into shards, once, so that training reads large files in sequence instead of millions of small ones.

Bytes are copied, never re-encoded. Everything is written beside the target and renamed when complete: a folder of
shards with an index is always whole.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from ssl_vit.config import InputError, Section, check
from ssl_vit.data.formats import printable, say
from ssl_vit.data.images import Images, by_extension, open_images
from ssl_vit.data.index import Shard, write_index
from ssl_vit.data.order import permutation
from ssl_vit.data.staging import check_target, whole_folder
from ssl_vit.data.tars import SAMPLE, ShardWriter

REFUSED = "refused.jsonl"
_CHUNK = 64  # images a thread handles at a time


class PackOptions(Section):
    """The settings of packing."""

    shuffle: bool = Field(True, description="write the samples in a random order over the whole source")
    seed: int = Field(0, ge=0, description="seed of that order")
    labels: Literal["auto", "none"] = Field("auto", description="none: leave classes out")
    maxcount: int = Field(10_000, gt=0, description="samples in a shard at most")
    maxsize: float = Field(1e9, gt=0, description="a shard is closed when it has this many bytes")
    max_refused: float = Field(0.2, ge=0, le=1, description="share of broken images above which packing fails")
    verify: bool = Field(True, description="decode every image in full; no: only its header")
    overwrite: bool = Field(False, description="replace a folder of shards that stands at OUT")
    workers: int = Field(2, ge=1, description="threads that read and decode")
    image_column: str = Field("", description="hf: the column with the images, where there are several")
    label_column: str = Field("", description="hf: the column with the labels, where there are several")


def pack(source: str, out: Path, **options: Any) -> dict[str, Any]:
    """Pack a folder, an HF dataset or the built-in digits into the folder ``out``.

    Args:
        source: ``PATH`` or ``folder:PATH``, ``hf:NAME_OR_PATH[:SPLIT]``, ``builtin:digits[-train|-test]``.
        out: must be absent or empty.
        options: see :class:`PackOptions`.

    Returns:
        Counts ``found, packed, refused, skipped, ignored, shards, bytes``, the ``modes`` of the images, ``classes``.

    Raises:
        InputError: a bad option or source, a target in the way, nothing packed, or too many images refused.
    """
    settings = check(PackOptions, options)
    check_target(out, settings.overwrite)
    images = open_images(source, settings.labels, settings.image_column, settings.label_column)
    return pack_images(images, source, out, settings)


def pack_images(images: Images, source: str, out: Path, settings: PackOptions) -> dict[str, Any]:
    """Pack opened images, and print what was done; see :func:`pack`."""
    began = time.perf_counter()
    with whole_folder(out, settings.overwrite) as folder:
        packing = _Packing(folder, settings)
        with (folder / REFUSED).open("w", encoding="ascii") as log:
            for image in _checked_images(images, settings):
                if image.reason:
                    print(json.dumps({"path": printable(image.name), "refused": image.reason}), file=log)
                packing.add(image)
        packing.close_shard()
        summary = {
            "found": len(images),
            "packed": packing.packed,
            "refused": len(packing.refused),
            "skipped": len(images.skipped),
            "ignored": len(images.ignored),
            "shards": len(packing.shards),
            "bytes": sum(shard.filesize for shard in packing.shards),
            "modes": dict(packing.modes.most_common()),
            "classes": images.classes,
        }
        _print_summary(summary, images, packing.refused, source, out, time.perf_counter() - began)
        _check_refused(packing, folder, out, source, settings.max_refused)
        write_index(folder, packing.shards, np.array(packing.samples, dtype=SAMPLE), images.classes)
    return summary


class _Image(NamedTuple):
    """An image that was read and looked at; ``reason`` says why it is refused, if it is."""

    position: int
    name: str
    label: int
    data: bytes = b""
    extension: str = ""
    mode: str = ""
    reason: str = ""


def _checked_images(images: Images, settings: PackOptions) -> Iterator[_Image]:
    """All images in the order of packing, read and decoded by threads."""
    from tqdm import tqdm

    from ssl_vit.data.decode import BadSample, inspect

    # Drawn over the sorted source, so the order does not depend on how the file system lists it.
    order = permutation(len(images), settings.seed) if settings.shuffle else np.arange(len(images))

    def look(position: int) -> _Image:
        i = int(order[position])
        found = _Image(position, images.name(i), images.labels[i])
        try:
            data = images.read(i)
            facts = inspect(data, full=settings.verify)
        except (BadSample, OSError, ValueError) as error:
            return found._replace(reason=str(getattr(error, "strerror", None) or error))
        return found._replace(data=data, extension=facts.extension, mode=facts.mode)

    def look_at(chunk: range) -> list[_Image]:
        return [look(position) for position in chunk]

    positions = range(len(images))
    chunks = [positions[start : start + _CHUNK] for start in positions[::_CHUNK]]
    ahead = 4 * settings.workers  # bounds the memory of what is read but not yet written
    with ThreadPoolExecutor(settings.workers) as pool, tqdm(total=len(images), unit="image", disable=None) as bar:
        running = [pool.submit(look_at, chunk) for chunk in chunks[:ahead]]
        for number in range(len(chunks)):
            yield from (done := running.pop(0).result())
            bar.update(len(done))
            if number + ahead < len(chunks):
                running.append(pool.submit(look_at, chunks[number + ahead]))


class _Packing:
    """Shards being filled one after the other."""

    def __init__(self, folder: Path, settings: PackOptions) -> None:
        self.folder, self.settings = folder, settings
        self.shards: list[Shard] = []
        self.samples: list[tuple[int, int, int, int]] = []
        self.refused: list[tuple[str, str]] = []
        self.modes: Counter[str] = Counter()
        self._writer: ShardWriter | None = None

    @property
    def packed(self) -> int:
        return len(self.samples)

    @property
    def _url(self) -> str:
        return f"shard-{len(self.shards):06d}.tar"

    def add(self, image: _Image) -> None:
        if image.reason:
            self.refused.append((printable(image.name), image.reason))
            return
        writer = self._writer or ShardWriter(self.folder / self._url)
        self._writer = writer
        # The place in the whole order is unique, dot-free and ASCII, whatever the source calls its files.
        writer.add(f"{image.position:09d}", image.extension, image.data, image.label, {"path": printable(image.name)})
        self.samples.append(writer.samples[-1])
        self.modes[image.mode] += 1
        if len(writer.samples) >= self.settings.maxcount or writer.size >= self.settings.maxsize:
            self.close_shard()

    def close_shard(self) -> None:
        if self._writer is not None:
            sha256 = self._writer.close()
            self.shards.append(Shard(self._url, len(self._writer.samples), self._writer.size, sha256))
            self._writer = None


def _check_refused(packing: _Packing, folder: Path, out: Path, source: str, max_refused: float) -> None:
    refused = len(packing.refused)
    if packing.packed and refused <= max_refused * (packing.packed + refused):
        return
    kept = out.parent / f"{out.name}.{REFUSED}"
    shutil.copyfile(folder / REFUSED, kept)
    first = "; ".join(f"{name} {reason}" for name, reason in packing.refused[:3])
    raise InputError(
        f"{source}: {refused} of {packing.packed + refused} images refused ({first}); all are listed in {kept}; "
        f"repair or remove them, or allow more with max_refused={refused / (packing.packed + refused):.2g}"
    )


def _print_summary(
    summary: dict[str, Any], images: Images, refused: list[tuple[str, str]], source: str, out: Path, seconds: float
) -> None:
    classes = summary["classes"] or []
    say(f"{source}: found {summary['found']} images, packed {summary['packed']}, refused {summary['refused']}")
    for name, reason in refused[:5]:
        say(f"  refused  {name}: {reason}")
    for word in ("skipped", "ignored"):
        if names := getattr(images, word):
            say(f"  {word}  {by_extension([printable(name) for name in names])}")
    first = ", ".join([*classes[:10], *(["..."] if len(classes) > 10 else [])])
    say(f"  classes  {len(classes) or 'none: unlabelled'} {first}")
    say(f"  modes    {', '.join(f'{count} {mode}' for mode, count in summary['modes'].items())}")
    speed = f"{summary['found'] / seconds:.0f} images/s"
    say(f"  wrote    {out}: {summary['shards']} shards, {summary['bytes'] / 1e6:.1f} MB, {speed}")
