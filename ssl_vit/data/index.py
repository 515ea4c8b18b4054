"""The index of a folder of shards: which samples there are, and where their bytes lie.

``index.json`` lists the shards in the layout of a wids index (``shardlist`` with url, nsamples, filesize) plus their
sha256 and the class names; ``index.samples.npy`` beside it holds one :data:`SAMPLE` record for each sample.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.config import InputError
from ssl_vit.data import remote
from ssl_vit.data.formats import printable
from ssl_vit.data.presence import check_shards, make_anew
from ssl_vit.data.processes import cores, spread
from ssl_vit.data.remote import is_url
from ssl_vit.data.shard_cache import RemoteShard, ShardCache
from ssl_vit.data.staging import unfinished
from ssl_vit.data.tars import SAMPLE, Scan, key_of, member_name, next_name, scan_shard

__all__ = ["SAMPLE", "Index", "Shard", "build_index", "read_index", "write_index"]

INDEX = "index.json"
TABLE = "index.samples.npy"


@dataclass(frozen=True)
class Shard:
    """One tar file: where it is (relative to the index's root, or absolute), samples, bytes, checksum."""

    url: str
    nsamples: int
    filesize: int
    sha256: str


class Index:
    """The samples of a list of shards, shards concatenated in their order.

    Args:
        root: the folder or URL that the shards' relative urls start from.
        shards: the shards.
        samples: SAMPLE records ``(N,)``, usually memory-mapped.
        classes: class names by label, if known.
        cache: where remote shards are kept; None: they are read by ranges.
    """

    def __init__(
        self, root: str, shards: list[Shard], samples: np.ndarray, classes: list[str] | None,
        cache: ShardCache | None = None,
    ) -> None:  # fmt: skip
        self.root, self.shards, self.samples, self.classes, self.cache = root, shards, samples, classes, cache
        # once, not for every sample that is read
        join = (lambda url: f"{root}/{url}") if is_url(root) else partial(os.path.join, root)
        self._paths = [s.url if is_url(s.url) else join(s.url) for s in shards]
        self._remotes = [
            RemoteShard(path, s.filesize, s.sha256) if is_url(path) else None
            for path, s in zip(self._paths, shards, strict=True)
        ]
        self.shard_sizes = np.array([shard.nsamples for shard in shards], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        assert len(samples) == self.starts[-1], (len(samples), self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the file again instead of receiving the table's bytes.
        mapped = isinstance(self.samples, np.memmap) and self.samples.filename is not None
        return {**vars(self), "samples": str(self.samples.filename) if mapped else self.samples}  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self.samples, str):
            self.samples = np.load(self.samples, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return len(self) > 0 and int(self.samples["label"].min()) >= 0

    @property
    def fingerprint(self) -> str:
        """A hash of the data, whatever folder it lies in: sha256 over the shards' names, counts and checksums."""
        facts = [[os.path.basename(shard.url), shard.nsamples, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([facts, self.classes]).encode()).hexdigest()

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        assert 0 <= sample < len(self), (sample, len(self))
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def path(self, shard: int) -> str:
        """The file or URL of a shard."""
        return self._paths[shard]

    def remote(self, shard: int) -> RemoteShard | None:
        """What a cache knows a shard by; None for a local one."""
        return self._remotes[shard]

    def remote_bytes(self, shard: RemoteShard, offset: int, size: int) -> bytes:
        """Bytes of a remote shard.

        Raises:
            ReadError: they cannot be had.
        """
        if self.cache is None:
            return remote.read(shard.url, offset, offset + size, shard.filesize)
        return self.cache.read(shard, offset, size)

    def key(self, sample: int) -> str:
        """A sample's key, read from its tar header: keys are needed for messages and rules only."""
        header, image, _, _ = self.samples[sample].item()
        shard = self.shard_of(sample)
        if (remote_shard := self.remote(shard)) is not None:
            name = next_name(io.BytesIO(self.remote_bytes(remote_shard, header, image - header)))
        else:
            name = member_name(Path(self.path(shard)), header)
        return printable(key_of(name))

    def describe(self, sample: int) -> str:
        """Name a sample in a message, e.g. ``shard-000003.tar: key 0000012``."""
        url = os.path.basename(self.shards[self.shard_of(sample)].url)
        try:
            return f"{url}: key {self.key(sample)}"
        except Exception:  # a message about a broken shard must not fail on that shard
            return f"{url}: sample {sample - int(self.starts[self.shard_of(sample)])}"

    def subset(self, shards: Sequence[int]) -> Index:
        """The index of some of the shards, in the given order."""
        parts = [self.samples[self.starts[i] : self.starts[i + 1]] for i in shards]
        return Index(self.root, [self.shards[i] for i in shards], np.concatenate(parts), self.classes, self.cache)


def read_index(folder: str | os.PathLike[str], root: str | None = None, cache: ShardCache | None = None) -> Index:
    """Read the index of a folder and check that every shard is there, with the right size.

    Args:
        folder: where the index lies.
        root: the URL of the shards, where that is another place.
        cache: for remote shards.

    Raises:
        InputError: the index or a shard is missing, unreadable, or they do not belong together.
    """
    folder = Path(folder)
    cure = make_anew(root or str(folder))
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shards = [Shard(s["url"], s["nsamples"], s["filesize"], s.get("sha256", "")) for s in content["shardlist"]]
        samples = np.load(folder / TABLE, mmap_mode="r")
    except FileNotFoundError as error:
        raise InputError(unfinished(folder) or f"{error.filename}: no such file; {cure}") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(f"{folder / INDEX}: cannot be read ({error}); {cure}") from None
    if samples.dtype != SAMPLE or len(samples) != sum(shard.nsamples for shard in shards):
        raise InputError(f"{folder / TABLE}: does not belong to {INDEX} beside it; {cure}")
    index = Index(root or str(folder), shards, samples, content.get("classes"), cache)
    check_shards(index, folder)
    return index


def known_classes(folder: Path) -> list[str] | None:
    """The class names in a folder's index, if it has a readable one."""
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8")).get("classes")
    except (OSError, ValueError, AttributeError):
        return None


def write_index(folder: Path, shards: list[Shard], samples: np.ndarray, classes: list[str] | None) -> None:
    """Write table and index of a folder, each at once and the index last: it says that all is there."""
    for name, write in (
        (TABLE, lambda file: np.save(file, samples, allow_pickle=False)),
        (INDEX, lambda file: file.write(_as_json(shards, classes).encode())),
    ):
        temporary = folder / f".{name}.{os.getpid()}"
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, folder / name)


def _as_json(shards: list[Shard], classes: list[str] | None) -> str:
    content = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "shardlist": [asdict(shard) for shard in shards],
        "classes": classes,
        "samples": TABLE,
    }
    return json.dumps(content, indent=1) + "\n"


def build_index(
    paths: Iterable[str | os.PathLike[str]],
    out_folder: str | os.PathLike[str],
    classes: list[str] | None = None,
    workers: int | None = None,
) -> Index:
    """Scan shards made by anybody and write their index into a folder (which may be another than theirs).

    Args:
        paths: the shards.
        out_folder: where the index goes.
        classes: class names by label, if known.
        workers: processes that scan; None: one a core.

    Raises:
        InputError: shards cannot be read as samples (see :func:`~ssl_vit.data.tars.scan_shard`), or there are none.
    """
    from tqdm import tqdm

    out = Path(out_folder)
    files = [Path(path) for path in paths]
    running = spread(_scan_or_reason, files, workers or cores())
    found = list(tqdm(running, total=len(files), unit="shard", disable=None))
    if reasons := [reason for reason in found if isinstance(reason, str)]:
        raise InputError("; ".join(reasons[:3]) + (f"; {len(reasons) - 3} more shards are bad" if reasons[3:] else ""))
    scans = [scan for scan in found if isinstance(scan, Scan)]
    samples = np.concatenate([scan.samples for scan in scans]) if scans else np.empty(0, SAMPLE)
    if len(samples) == 0:
        raise InputError(f"{', '.join(map(str, files[:3])) or out}: no samples to index; give tar shards with images")
    labels = samples["label"]
    if classes is not None and labels.max() >= len(classes):
        raise InputError(f"{out}: a sample has label {labels.max()}, but only {len(classes)} class names are given")
    home = out.resolve()
    shards = []
    for file, scan in zip(files, scans, strict=True):
        url = file.name if file.resolve().parent == home else str(file.absolute())
        shards.append(Shard(url, len(scan.samples), scan.filesize, scan.sha256))
    out.mkdir(parents=True, exist_ok=True)
    write_index(out, shards, samples, classes)
    return read_index(out)


def _scan_or_reason(path: Path) -> Scan | str:
    try:
        return scan_shard(path)
    except InputError as error:
        return str(error)
