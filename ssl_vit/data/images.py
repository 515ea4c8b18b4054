"""Collections of images before packing: folders here, digits and HF datasets in files of their own."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from ssl_vit.config import InputError, nearest
from ssl_vit.data.formats import CLAIMS, EXTENSIONS, HEAD, extension_of, printable, sniff

_TOOL_FILES = frozenset(["thumbs.db", "desktop.ini", "__macosx"])


class Images(Protocol):
    """What can be packed: named, labelled image files in a fixed order."""

    classes: list[str] | None
    """Class names by label; None if unlabelled."""
    labels: list[int]
    """A label for each image; -1 without."""
    skipped: list[str]
    """Files that do not claim to be images."""
    ignored: list[str]
    """Hidden files and tools' files, which nobody means."""
    repeated: list[str]
    """Links to folders whose images are here already, as ``LINK -> FOLDER``."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Where image ``i`` comes from, for messages and the JSON member."""
        ...

    def read(self, i: int) -> bytes:
        """The bytes of image ``i``; ``OSError`` or ``ValueError`` if it has none."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the images do, without reading them."""
        ...


def open_images(spec: str, labels: str = "auto", image_column: str = "", label_column: str = "") -> Images:
    """The images of a source.

    Args:
        spec: ``folder:PATH`` or a plain path; ``list:FILE`` of paths; ``shards:PATH`` of tars;
            ``hf:NAME_OR_PATH[:SPLIT]``; ``builtin:digits[-train|-test]``.
        labels: ``"auto"``, or ``"none"`` to leave classes out.
        image_column: of an HF dataset with several.
        label_column: of an HF dataset with several.

    Raises:
        InputError: nothing is there, or it holds no images.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "list" and colon:
        from ssl_vit.data.lists import ListedImages

        return ListedImages(Path(rest).expanduser(), labels)
    if kind == "shards" and colon:
        from ssl_vit.data.repacking import ShardImages

        return ShardImages(rest, labels)
    if kind == "builtin" and colon:
        from ssl_vit.data.digits import PARTS, DigitImages

        if rest not in PARTS:
            raise InputError(f"{spec}: no such built-in data{nearest(rest, PARTS)}; allowed: {', '.join(PARTS)}")
        return DigitImages(rest, labels)
    if kind == "hf" and colon:
        from ssl_vit.data.hub import HubImages

        return HubImages(rest, labels, image_column, label_column)
    return FolderImages(Path(rest if kind == "folder" and colon else spec).expanduser(), labels)


class ImageFiles:
    """Image files by their paths below a folder: what sources made of files share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.classes: list[str] | None = None
        self.labels: list[int] = []
        self.skipped: list[str] = []
        self.ignored: list[str] = []
        self.repeated: list[str] = []
        self._files: list[tuple[str, int, int]] = []  # path, bytes and time of change in ns, -1 where nothing is

    def _classify(self, words: Sequence[str] | None) -> None:
        """Label each image with the number of its class name; None: with nothing."""
        if words is None:
            self.labels = [-1] * len(self)
            return
        names = sorted(set(words), key=os.fsencode)
        number = {name: i for i, name in enumerate(names)}
        self.classes = [printable(name) for name in names]
        self.labels = [number[word] for word in words]

    def __len__(self) -> int:
        return len(self._files)

    def name(self, i: int) -> str:
        """The path below the folder."""
        return self._files[i][0]

    def read(self, i: int) -> bytes:
        """The bytes of image ``i``."""
        return (self.root / self._files[i][0]).read_bytes()

    def fingerprint(self) -> str:
        """A hash of all names, sizes, times of change and labels."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for (name, size, changed), label in zip(self._files, self.labels, strict=True):
            digest.update(os.fsencode(name) + f"\0{size}\0{changed}\0{label}\n".encode())
        return digest.hexdigest()


class FolderImages(ImageFiles):
    """A folder of image files, any depth; labelled if all images lie in two or more first-level folders.

    Links are followed, each folder once. Files with an image's extension count as images whatever they hold (packing
    refuses those that are none); other files if they begin like an image.

    Args:
        root: the folder.
        labels: ``"auto"``, or ``"none"`` to leave classes alone.
    """

    def __init__(self, root: Path, labels: str = "auto") -> None:
        if not root.is_dir():
            what = "is a file" if root.exists() else "no such folder"
            raise InputError(f"folder:{root}: {what}; give a folder of images")
        super().__init__(root)
        self._files = sorted(self._walk(), key=lambda file: os.fsencode(file[0]))
        if not self._files:
            others = [printable(name) for name in self.skipped[:1]]
            seen = f"; it holds {len(self.skipped)} other files, e.g. {others[0]}" if others else ""
            raise InputError(f"folder:{root}: no images in it{seen}; allowed: {' '.join(sorted(EXTENSIONS))}")
        firsts = [name.partition("/")[0] if "/" in name else "" for name, _, _ in self._files]
        labelled = labels != "none" and len(set(firsts)) > 1 and "" not in firsts
        self._classify(firsts if labelled else None)

    def _walk(self) -> Iterator[tuple[str, int, int]]:
        """Yield (relative name, bytes, mtime in ns) of the images; note the rest.

        Real folders come before links, so that no link takes the place of the folder it leads to.
        """
        folders, links = deque([""]), deque[str]()
        visited: dict[tuple[int, int], str] = {}
        while folders or links:
            below = (folders or links).popleft()
            try:
                status = (self.root / below).stat()
                first = visited.setdefault((status.st_dev, status.st_ino), below)
                if first != below:
                    self.repeated.append(f"{below} -> {first or '.'}")
                    continue
                with os.scandir(self.root / below) as scan:
                    entries = sorted(scan, key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                if not below:
                    raise InputError(f"folder:{self.root}: cannot be read: {error.strerror}") from None
                yield f"{below}/", -1, -1  # packing refuses it by name
                continue
            for entry in entries:
                name = f"{below}/{entry.name}" if below else entry.name
                status = _status(entry)
                kind = stat.S_IFMT(status.st_mode) if status else None  # a link to nowhere or to itself has none
                if entry.name.startswith(".") or entry.name.lower() in _TOOL_FILES:
                    self.ignored.append(name)
                elif kind == stat.S_IFDIR:
                    (links if entry.is_symlink() else folders).append(name)
                elif extension_of(entry.name) in CLAIMS or (kind == stat.S_IFREG and _begins_like_image(entry.path)):
                    known = status if kind == stat.S_IFREG else None
                    yield (name, known.st_size, known.st_mtime_ns) if known else (name, -1, -1)
                else:
                    self.skipped.append(name)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return None


def _begins_like_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return sniff(file.read(HEAD)) is not None
    except OSError:
        return False


def by_extension(names: Sequence[str]) -> str:
    """``3 txt, 1 md (labels.txt, ...)``: what kind of files these are, most frequent first."""
    counts = Counter(extension_of(name) or "without extension" for name in names)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(5))
    return f"{kinds} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
