"""From a sample's place to its bytes, on a local disk or a remote server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO

from ssl_vit.data.index import Index
from ssl_vit.data.remote import ReadError

__all__ = ["ReadError", "Reader", "opened"]


@contextmanager
def opened(index: Index, shard: int) -> Iterator[BinaryIO]:
    """The whole file of a shard; of a remote one that in the cache of its index, which it must have.

    Raises:
        OSError: it cannot be opened; :class:`ReadError`: downloaded.
    """
    remote = index.remote(shard)
    if remote is None:
        with open(index.path(shard), "rb") as file:
            yield file
        return
    assert index.cache is not None
    with index.cache.opened(remote) as file:
        yield file


class _File:
    """An open file that closes when nobody uses it any more, so that a reading thread never loses it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # os is gone when the interpreter ends
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class Reader:
    """Reads images out of shards: of local and cached ones with one ``pread`` at the indexed offset.

    Safe in threads and after a fork (a read moves no file position); travels to a worker without its open files.

    Args:
        index: the shards.
        max_open: files kept open at most.
    """

    def __init__(self, index: Index, max_open: int = 128) -> None:
        self.index, self.max_open = index, max_open
        self._open = lru_cache(max_open)(_File)

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["index"], state["max_open"])

    def read(self, sample: int) -> bytes:
        """The bytes of a sample's image.

        Raises:
            ReadError: naming the shard and the key.
        """
        index = self.index
        shard = index.shard_of(sample)
        _, offset, size, _ = index.samples[sample].item()
        if (remote := index.remote(shard)) is not None:
            return index.remote_bytes(remote, offset, size)
        path = index.path(shard)
        try:
            # held until the read is done: it closes with its last reference, and the cache may drop it at any time
            file = self._open(path)
            data = os.pread(file.descriptor, size, offset)
            while len(data) < size and (more := os.pread(file.descriptor, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise ReadError(f"{path}: {index.describe(sample)}: {error.strerror or error}") from error
        if len(data) < size:
            raise ReadError(
                f"{path}: {index.describe(sample)}: {len(data)} of {size} bytes could be read, the file ends there; "
                "it has changed since the run began"
            )
        return data
