"""The index of remote shards: read beside them, or made once and kept here, since the remote may be read-only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from ssl_vit.config import InputError
from ssl_vit.data import remote
from ssl_vit.data.index import INDEX, TABLE, Index, Shard, read_index, write_index
from ssl_vit.data.processes import spread
from ssl_vit.data.remote import ReadError, Refused
from ssl_vit.data.shard_cache import RemoteShard, ShardCache
from ssl_vit.data.tars import scan_shard


def expand(spec: str) -> list[str]:
    """The URLs of a brace range.

    Raises:
        InputError: a brace is not closed.
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # pyright: ignore[reportAttributeAccessIssue]

    try:
        return list(braceexpand(spec))
    except UnbalancedBracesError:
        raise InputError(f"{spec}: a brace is not closed; write e.g. shard-{{000000..000099}}.tar") from None


def open_remote(spec: str, cache: Path, shards: ShardCache | None) -> Index:
    """The index of a remote source.

    Args:
        spec: URL of a folder with an index, of a shard, or a brace range of shards.
        cache: folder for indexes.
        shards: cache of the shards; None: they are read by ranges.

    Raises:
        InputError: the source has no index or cannot be read.
        ReadError: its server does not answer.
    """
    remote.check_scheme(spec)
    urls = expand(spec)
    homes = {spec.rstrip("/")} if not _is_shard(urls[0]) else {url.rpartition("/")[0] for url in urls}
    reason = "the shards are in several folders"
    if len(homes) == 1:
        home = homes.pop()
        try:
            index = _copied(home, remote.content(f"{home}/{INDEX}"), cache, shards)
            return index if not _is_shard(urls[0]) else _part(index, urls, spec)
        except Refused as error:
            reason = str(error)
    try:
        urls = urls if _is_shard(urls[0]) else remote.tars(spec)
    except Refused:
        urls = []
    folder = made_index(urls, cache)
    if urls and (folder / INDEX).exists():
        return read_index(folder, cache=shards)
    raise InputError(
        f"{spec}: no index is found ({reason}); upload the {INDEX} and {TABLE} that pack.py wrote, or make them from "
        f"the shards, each read once: python pipelines/index.py '{spec}'"
    )


def _is_shard(url: str) -> bool:
    return urlsplit(url).path.endswith(".tar")


def made_index(urls: Sequence[str], cache: Path) -> Path:
    """The folder of the index that :func:`index_remote` makes of some shards."""
    return cache / f"index-remote-{_digest(urls)}"


def _copied(home: str, content: bytes, cache: Path, shards: ShardCache | None) -> Index:
    """A copy of the index beside the shards; one that has changed is another copy."""
    folder = cache / f"index-{_digest([home, content])}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / INDEX).exists():
        _copy(f"{home}/{TABLE}", folder / TABLE)
        _write(folder / INDEX, content)
    return read_index(folder, root=home, cache=shards)


def _copy(url: str, path: Path) -> None:
    length = remote.size(url)
    data = remote.content(url) if length is None else b"".join(remote.blocks(url, length))
    _write(path, data)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _part(index: Index, urls: Sequence[str], spec: str) -> Index:
    numbers = {index.path(number): number for number in range(len(index.shards))}
    if missing := [url for url in urls if url not in numbers]:
        raise InputError(
            f"{spec}: {len(missing)} of {len(urls)} are not in the {INDEX} there: {', '.join(missing[:3])}; correct "
            "the range"
        )
    return index.subset([numbers[url] for url in urls])


def index_remote(
    spec: str, cache: Path, out: Path | None = None, classes: list[str] | None = None, workers: int = 1
) -> tuple[Index, Path]:
    """Read remote shards once, and keep what is in them as an index.

    Args:
        spec: URL of a folder that can be listed, of a shard, or a brace range.
        cache: where the index goes, and shards for the time that they are read.
        out: a folder for the index instead.
        classes: class names by label; None: those in an index beside the shards, if they are enough.
        workers: processes, each with a shard.

    Returns:
        the index, and the folder that it is in.

    Raises:
        InputError: a shard cannot be had, or not be read as samples.
        ReadError: a server does not answer.
    """
    from tqdm import tqdm

    remote.check_scheme(spec)
    urls = expand(spec)
    try:
        urls = urls if _is_shard(urls[0]) else remote.tars(spec)
    except Refused as error:
        raise InputError(
            f"{error}; where a folder cannot be listed, give a range: shard-{{000000..000099}}.tar"
        ) from None
    if not urls:
        raise InputError(f"{spec}: no shards (*.tar) in it; give the folder that holds them, or a range")
    running = spread(partial(_scan, ShardCache(cache / "scanned")), urls, workers)
    found = list(tqdm(running, total=len(urls), unit="shard", disable=None))
    samples = np.concatenate([rows for _, rows in found])
    classes = classes or _classes_beside(urls[0], samples["label"].max())
    if classes is not None and samples["label"].max() >= len(classes):
        raise InputError(
            f"{spec}: a sample has label {samples['label'].max()}, but {len(classes)} class names are given"
        )
    folder = out or made_index(urls, cache)
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder, [shard for shard, _ in found], samples, classes)
    return read_index(folder), folder


def _classes_beside(url: str, label: int) -> list[str] | None:
    """The class names in the index beside a shard, if there are more than ``label``."""
    try:
        classes = json.loads(remote.content(f"{url.rpartition('/')[0]}/{INDEX}"))["classes"]
    except (Refused, ValueError, KeyError, TypeError):
        return None
    return classes if isinstance(classes, list) and label < len(classes) else None


def gives(spec: str, index: Index, cache: Path) -> bool:
    """Whether a URL is read by this index: one that stands beside the shards goes before one made here."""
    try:
        return open_remote(spec, cache, None).fingerprint == index.fingerprint
    except InputError:
        return False


def _scan(cache: ShardCache, url: str) -> tuple[Shard, np.ndarray]:
    path: Path | None = None
    try:
        length = remote.size(url)
        if not length:
            raise InputError(f"{url}: is empty, or its server does not say how long it is")
        shard = RemoteShard(url, length, "")
        path = cache.folder / shard.name
        cache.fetch(shard)
        scan = scan_shard(path)
    except (InputError, ReadError) as error:
        raise InputError(str(error).replace(str(path), url)) from None
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    return Shard(url, len(scan.samples), scan.filesize, scan.sha256), scan.samples


def _digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode("utf-8", "backslashreplace")).hexdigest()[:16]
