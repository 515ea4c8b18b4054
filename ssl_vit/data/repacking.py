"""Images of tar shards, ours or others', to be packed again: mixed, cut anew, made smaller."""

from __future__ import annotations

from tarfile import TarError

from ssl_vit.config import InputError
from ssl_vit.data.formats import printable
from ssl_vit.data.reader import Reader, ReadError, opened
from ssl_vit.data.tars import source_path


class ShardImages:
    """The images of shards with their labels and class names; other members than image, label and path are left out.

    Args:
        spec: what names shards as data of a recipe: a folder, a range, a glob, a URL.
        labels: ``"auto"``, or ``"none"`` to leave the labels out.
    """

    def __init__(self, spec: str, labels: str = "auto") -> None:
        from ssl_vit.data.sources import open_source  # which packs, so it imports this package's sources of images

        self._index = open_source(spec)
        self._reader = Reader(self._index)
        self.classes = None if labels == "none" else self._index.classes
        self.labels = [-1] * len(self._index) if labels == "none" else self._index.samples["label"].tolist()
        self.skipped: list[str] = []
        self.ignored: list[str] = []
        self.repeated: list[str] = []

    def __len__(self) -> int:
        return len(self._index)

    def name(self, i: int) -> str:
        """The path that packing kept beside the image, else its key.

        Raises:
            InputError: the shard cannot be read.
        """
        shard = self._index.shard_of(i)
        try:
            with opened(self._index, shard) as file:
                file.seek(int(self._index.samples["header"][i]))
                return source_path(file)
        except (OSError, TarError) as error:
            raise InputError(f"{self._index.path(shard)}: cannot be read: {error}") from None

    def read(self, i: int) -> bytes:
        """The bytes of image ``i``.

        Raises:
            InputError: the shard cannot be read, which is no fault of the image.
        """
        try:
            return self._reader.read(i)
        except ReadError as error:
            raise InputError(printable(str(error))) from None

    def fingerprint(self) -> str:
        """The shards' names and checksums."""
        return self._index.fingerprint
