"""Tar shards, byte by byte: writing ours, and finding the samples in anybody's."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ssl_vit.config import InputError
from ssl_vit.data.formats import EXTENSIONS, beginning, extension_of, printable

SAMPLE = np.dtype([("header", "<u8"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
"""A sample of a shard: byte offsets of its first tar header and of its image, the image's bytes, its label or -1."""

# As webdataset cuts: the key ends at the first dot of the base name; names without a dot and dot-files are no members.
_MEMBER = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)
_END = bytes(2 * tarfile.BLOCKSIZE)
_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)  # fields of a header


class ShardWriter:
    """Writes one shard with fixed headers, so that equal samples give equal bytes.

    Args:
        path: the file to write.
    """

    def __init__(self, path: Path) -> None:
        self.samples: list[tuple[int, int, int, int]] = []
        self.size = 0
        self._file = path.open("wb")
        self._hash = hashlib.sha256()

    def add(self, key: str, extension: str, image: bytes, label: int, facts: dict[str, object]) -> None:
        """Append a sample: its image, its label (-1: none) and a JSON member with ``facts``."""
        self.samples.append((self.size, self.size + tarfile.BLOCKSIZE, len(image), label))
        members = [(extension, image), ("json", json.dumps(facts).encode())]
        if label >= 0:
            members.insert(1, ("cls", str(label).encode()))
        self._write(b"".join(part for field, data in members for part in _member(f"{key}.{field}", data)))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> str:
        """End the archive, wait until the disk has it, and return the sha256 of its bytes."""
        self._write(_END + bytes(-(self.size + len(_END)) % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()


def _member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, data and padding as ``tarfile`` writes them, whose own way takes longer than all the rest of packing."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[_SIZE] = b"%011o\0" % len(data)
    header[_CHECKSUM] = b" " * 8  # as the checksum is defined
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header), data, bytes(-len(data) % tarfile.BLOCKSIZE)


class Scan(NamedTuple):
    """What a shard holds."""

    samples: np.ndarray  # SAMPLE records
    sha256: str
    filesize: int
    ignored: int  # members that belong to no sample: without extension, or dot-files


class _Group:
    """The members of the sample that is being read."""

    def __init__(self, key: str, header: int) -> None:
        self.key, self.header, self.label = key, header, -1
        self.image: tuple[str, int, int] | None = None
        self.fields: set[str] = set()


def scan_shard(path: Path) -> Scan:
    """Find the samples of a tar file, and refuse by name what would be read wrongly.

    Raises:
        InputError: the file is no tar, is cut short, holds a member twice, a sample in pieces, or a sample that has no
            image or several.
    """
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            filesize = file.tell()
            file.seek(0)
            samples, ignored = _scan(path, file, filesize)
        if not samples:
            raise InputError(f"{path}: holds no samples; copy or download it again, or leave it out")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    return Scan(np.array(samples, dtype=SAMPLE), sha256, filesize, ignored)


def _scan(path: Path, file, filesize: int) -> tuple[list[tuple[int, int, int, int]], int]:
    cut = f"{path}: the shard is cut short, it ends at byte {filesize}"
    cure = "copy or download it again"
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  closed with its file
    except tarfile.TarError:
        file.seek(0)
        head = file.read(64)
        what = cut if head[257:262] == b"ustar" else f"{path}: is not a tar archive, it {beginning(head)}"
        raise InputError(f"{what}; {cure}") from None
    samples, seen, ignored = [], set(), 0
    group: _Group | None = None
    while True:
        try:
            info = tar.next()
        except tarfile.TarError as error:
            raise InputError(f"{cut} inside a member ({error}); {cure}") from None
        if info is None:
            break
        tar.members = []  # type: ignore[assignment]  or every header of the shard stays in memory
        if info.isfile() and info.offset_data + info.size > filesize:
            raise InputError(f"{cut} inside member {printable(info.name)!r}; {cure}")
        match = _MEMBER.match(info.name) if info.isfile() else None
        if match is None:
            ignored += info.isfile()
            continue
        key, field = match[1], match[2].lower()  # webdataset lower-cases fields as well
        if group is None or key != group.key:
            samples += _finished(path, group)
            group = _Group(key, info.offset)
            if key in seen:
                raise InputError(
                    f"{path}: key {printable(key)!r} appears again at byte {info.offset}, {printable(info.name)!r}: "
                    "the members of a sample must stand together, each once (tar without --sort=name, or tar --append, "
                    "does this); cure: extract the shard and write it with tar --sort=name"
                )
            seen.add(key)
        _add_member(path, group, field, info, tar)
    samples += _finished(path, group)
    _check_end(path, file, tar.offset, filesize)
    return samples, ignored


def _add_member(path: Path, group: _Group, field: str, info: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    name = printable(info.name)
    if field in group.fields:
        raise InputError(
            f"{path}: member {name!r} is there twice (again at byte {info.offset}), as after tar --append; "
            "cure: extract the shard and write it again, or pack the images anew"
        )
    group.fields.add(field)
    extension = extension_of(info.name)
    if extension in EXTENSIONS:
        if group.image is not None:
            raise InputError(
                f"{path}: key {printable(group.key)!r} has two images, {printable(group.image[0])!r} and {name!r}: "
                "a key ends at the first dot of a file name; cure: pack the images with pipelines/pack.py, which makes "
                "keys without dots, or keep one image for each key"
            )
        group.image = (info.name, info.offset_data, info.size)
    elif field == "cls" or (field == "json" and "cls" not in group.fields):
        member = tar.extractfile(info)
        group.label = _label(path, name, field, member.read() if member else b"", group.label)


def _label(path: Path, name: str, field: str, data: bytes, before: int) -> int:
    """The label in a ``.cls`` (whole number as text) or ``.json`` member (key "label" or "cls")."""
    try:
        if field == "cls":
            value = int(data)
        else:
            facts = json.loads(data)
            value = facts.get("label", facts.get("cls", before)) if isinstance(facts, dict) else before
    except ValueError:
        value = None
    if field == "json" and (not isinstance(value, int) or isinstance(value, bool)):
        return before
    if value is None or not -1 <= value < 2**31:
        raise InputError(f"{path}: member {name!r} is {data[:32]!r}; allowed: a class number, or -1: none")
    return value


def _finished(path: Path, group: _Group | None) -> list[tuple[int, int, int, int]]:
    if group is None:
        return []
    if group.image is None:
        raise InputError(
            f"{path}: key {printable(group.key)!r} has no image, only {', '.join(sorted(group.fields))}; image members "
            f"end in one of: {' '.join(sorted(EXTENSIONS))}"
        )
    _, offset, size = group.image
    return [(group.header, offset, size, group.label)]


def _check_end(path: Path, file, offset: int, filesize: int) -> None:
    """A tar that was cut at a member's border reads well; only its two end blocks tell that nothing is missing."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        raise InputError(f"{path}: damaged at byte {offset}: no tar header there; copy or download the shard again")
    if len(block) < tarfile.BLOCKSIZE:
        raise InputError(
            f"{path}: the shard is cut short, its end-of-archive blocks are missing at byte {filesize}; copy or "
            f"download it again, or, if you know that it is complete: head -c 1024 /dev/zero >> {path}"
        )


def member_name(path: Path, header: int) -> str:
    """The name of the member whose header stands at a byte offset, long names included."""
    with path.open("rb") as file:
        file.seek(header)
        return next_name(file)


def next_name(file: BinaryIO) -> str:
    """The name of the member whose header stands where a file is read next."""
    return next(iter(tarfile.TarFile(fileobj=file))).name


def source_path(file: BinaryIO) -> str:
    """Where the sample at the position of an open shard came from: the path in its JSON member, else its key."""
    tar, key = tarfile.TarFile(fileobj=file), None
    while (info := tar.next()) is not None and key in (None, key_of(info.name)):
        key = key_of(info.name)
        if extension_of(info.name) == "json" and (member := tar.extractfile(info)):
            try:
                facts = json.load(member)
            except ValueError:
                break
            if isinstance(facts, dict) and isinstance(facts.get("path"), str):
                return facts["path"]
    if key is None:
        raise tarfile.ReadError("the file ends before its sample")
    return key


def key_of(name: str) -> str:
    """The key of a member: its name up to the first dot of the base name."""
    match = _MEMBER.match(name)
    return match[1] if match else name
