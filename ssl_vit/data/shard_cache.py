"""Remote shards on this machine's disk: each downloaded once for all its processes, checked, and dropped for room."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ssl_vit.config import InputError
from ssl_vit.data import remote
from ssl_vit.data.remote import ReadError

_WHOLE, _PART = ".tar", ".part"


class RemoteShard(NamedTuple):
    """What a cached file is: its whole URL, bytes, and sha256 or "" where that is not known."""

    url: str
    filesize: int
    sha256: str

    @property
    def name(self) -> str:
        """Of its file in a cache: another URL, length or checksum is another file."""
        return hashlib.sha256(repr(tuple(self)).encode("utf-8", "backslashreplace")).hexdigest()[:32] + _WHOLE


@dataclass(frozen=True)
class ShardCache:
    """A folder of whole shards, shared by processes and jobs.

    A shard gets its name when all of it is there and its checksum is right. Who reads one holds a shared lock on it;
    what nobody reads is removed for room, the longest unused first. A download holds a lock on its part, which a
    killed process leaves behind without one: such parts are removed.

    Args:
        folder: on a local disk.
        limit: bytes, parts included; None: the disk is the limit.
    """

    folder: Path
    limit: int | None = None

    def read(self, shard: RemoteShard, offset: int, size: int) -> bytes:
        """Bytes of a shard, which is downloaded first if it is not here.

        Raises:
            ReadError: it cannot be had.
        """
        with self.opened(shard) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) < size:
            raise ReadError(f"{shard.url}: {len(data)} of {size} bytes are there at {offset}; index the shard anew")
        return data

    @contextmanager
    def opened(self, shard: RemoteShard) -> Iterator[BinaryIO]:
        """A shard's file, which stays in the cache while it is open."""
        path = self.folder / shard.name
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                self.fetch(shard)
                continue
            with file:
                _lock(file, fcntl.LOCK_SH)
                if not _linked(file, path):
                    continue
                if os.fstat(file.fileno()).st_size != shard.filesize:
                    path.unlink(missing_ok=True)  # the disk or machine has failed meanwhile: downloaded again
                    continue
                os.utime(file.fileno())  # used now
                yield file
                return

    def holds(self, shard: RemoteShard) -> bool:
        """Whether a shard is here; if so it counts as used now."""
        try:
            os.utime(self.folder / shard.name)
        except FileNotFoundError:
            return False
        return True

    def fetch(self, shard: RemoteShard, ahead: bool = False, keep: Set[str] = frozenset()) -> bool:
        """Download a shard unless it is here; whether it is here now.

        Args:
            shard: which.
            ahead: for later: not if another process is at it, nor if there is no room without what is used.
            keep: names of files that must not go for it.

        Raises:
            ReadError: it cannot be had.
            InputError: it is larger than the whole cache.
        """
        self.check_room(shard)
        path = self.folder / shard.name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._part(path.with_suffix(_PART), wait=not ahead) as file:
                if file is None or path.exists():
                    return file is not None
                while not self._reserve(file, shard.filesize, keep):
                    if ahead:
                        return False
                    time.sleep(0.05)  # what fills the cache is being read
                _download(shard, file)
                os.fsync(file.fileno())  # before it has its name, whatever happens to the machine
                os.replace(path.with_suffix(_PART), path)
                return True
        except ReadError:
            raise
        except OSError as error:
            raise ReadError(f"{shard.url}: cannot be kept in {self.folder}: {error.strerror or error}") from error

    @contextmanager
    def _part(self, path: Path, wait: bool) -> Iterator[BinaryIO | None]:
        """The file of a download, which only this process has meanwhile; None if another has it and ``wait`` is off."""
        while True:
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
                if not _lock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
                    yield None
                    return
                if _linked(file, path):  # else it was finished or removed while this process waited
                    try:
                        yield file
                    finally:
                        if _linked(file, path):
                            path.unlink()
                    return

    def _reserve(self, part: BinaryIO, size: int, keep: Set[str]) -> bool:
        """Take ``size`` bytes of the disk for a download, removing what is not used; whether there was room."""
        with (self.folder / ".lock").open("wb") as lock:
            _lock(lock, fcntl.LOCK_EX)
            files = []
            for path in self.folder.iterdir():
                try:
                    facts = path.stat()
                except FileNotFoundError:  # another process has just renamed it
                    continue
                if path.suffix == _PART and _remove(path):
                    continue
                if path.suffix in (_WHOLE, _PART):
                    files.append((facts.st_mtime_ns, path, facts.st_size))
            excess = sum(file[2] for file in files) + size - self.limit if self.limit is not None else 0
            for _, path, freed in sorted(files):
                if excess > 0 and path.suffix == _WHOLE and path.name not in keep and _remove(path):
                    excess -= freed
            if excess > 0:
                return False
            part.truncate(0)
            os.posix_fallocate(part.fileno(), 0, size)
            return True

    def check_room(self, shard: RemoteShard) -> None:
        """Refuse a shard for which there would never be room.

        Raises:
            InputError: saying what to set.
        """
        if self.limit is not None and self.limit < shard.filesize:
            raise InputError(
                f"data.cache_size={self.limit / 1e9:g}: {shard.url} alone has {shard.filesize / 1e9:.3g} GB; give "
                "more, or 0 for a request for each image"
            )

    def used(self, shards: Set[RemoteShard]) -> int:
        """Bytes of some shards that are here."""
        return sum(shard.filesize for shard in shards if (self.folder / shard.name).exists())


def _download(shard: RemoteShard, file: BinaryIO) -> None:
    digest, written = hashlib.sha256(), 0
    for block in remote.blocks(shard.url, shard.filesize):
        os.pwrite(file.fileno(), block, written)
        digest.update(block)
        written += len(block)
    if shard.sha256 and digest.hexdigest() != shard.sha256:
        raise ReadError(
            f"{shard.url}: what came is not what the index says, its sha256 is {digest.hexdigest()[:16]}... instead of "
            f"{shard.sha256[:16]}...; upload the shard again, or index it anew"
        )


def _lock(file: BinaryIO, how: int) -> bool:
    """Lock a file; False if another has it and ``how`` says not to wait."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(
            f"{file.name}: files cannot be locked there ({error.strerror}); set data.cache to a folder on a local disk"
        ) from None
    return True


def _linked(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Remove a file that no process holds a lock on."""
    try:
        with path.open("rb") as file:
            if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            path.unlink(missing_ok=True)
            return True
    except FileNotFoundError:
        return True
