"""Whether the shards of an index are there, as long as it says: looked at before the first step, all of them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_vit.config import InputError
from ssl_vit.data import remote
from ssl_vit.data.remote import ReadError, Refused, is_url

if TYPE_CHECKING:
    from ssl_vit.data.index import Index


def make_anew(place: str, kept: str = "FOLDER") -> str:
    """How to make the index of a folder or URL again; that of a URL is ``kept`` elsewhere, to be read there."""
    out = f" out={kept}, and use data.train={kept}" if is_url(place) else ""
    return f"make it anew: python pipelines/index.py {place}{out}"


def check_shards(index: Index, folder: Path) -> None:
    """Compare every shard's length with its index, and the tars beside an index with its list.

    Args:
        index: of local or remote shards.
        folder: where the index lies.

    Raises:
        InputError: shards are missing, have changed, or are not in the index.
        ReadError: a server does not answer.
    """
    first = index.path(0) if index.shards else ""
    elsewhere = is_url(first) and not is_url(index.root)
    cure = make_anew(first.rpartition("/")[0], str(folder)) if elsewhere else make_anew(index.root)
    missing, refused, changed = [], [], []
    numbers = range(len(index.shards))
    remotes = [number for number in numbers if is_url(index.path(number))]
    # one process of a run asks for all
    asked = remotes if os.environ.get("RANK", "0") == "0" else []
    found = dict(zip(asked, remote.sizes([index.path(number) for number in asked]), strict=True))
    for number in sorted({*numbers} - {*remotes} | {*asked}):
        shard = index.shards[number]
        size = found[number] if number in found else _local_size(index.path(number))
        if isinstance(size, Refused):
            refused.append(str(size))
        elif isinstance(size, ReadError):
            raise size
        elif size is None and number not in found:
            missing.append(shard.url)
        elif size is not None and size != shard.filesize:
            changed.append(f"{index.path(number)} has {size} bytes instead of {shard.filesize}")
    count = f"of {len(index.shards)} shards in the index"
    if missing:
        raise InputError(f"{index.root}: {_some(missing)} {count} missing; copy them there, or {cure}")
    if refused:
        raise InputError(f"{len(refused)} {count} cannot be read: {_some(refused)}; upload them, or {cure}")
    if changed:
        raise InputError(
            f"{len(changed)} {count} differ from it: {_some(changed)}; copy them again, or if they are right, {cure}"
        )
    # an index in the cache lists shards elsewhere by absolute path; tars beside an index are its shards
    unknown = {path.name for path in folder.glob("*.tar")} - {shard.url for shard in index.shards}
    if unknown:
        raise InputError(f"{folder}: {_some(sorted(unknown))} not in index.json; {cure}")


def check_last_images(index: Index) -> None:
    """Compare the header of each local shard's last image with the index, since another shard may have its length.

    The place of that header depends on the lengths of all images before it.

    Raises:
        InputError: shards hold other images than the index says.
    """
    locals_ = [n for n, shard in enumerate(index.shards) if shard.nsamples and index.remote(n) is None]
    if changed := [index.path(number) for number in locals_ if not _holds_last(index, number)]:
        raise InputError(
            f"{len(changed)} of {len(index.shards)} shards hold other images than the index says: {_some(changed)}; "
            f"copy them again, or if they are right, {make_anew(index.root)}"
        )


def _holds_last(index: Index, number: int) -> bool:
    _, offset, size, _ = index.samples[index.starts[number + 1] - 1].item()
    try:
        with open(index.path(number), "rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except (OSError, tarfile.HeaderError):
        return False
    return header.size == size


def _local_size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
