"""Which bytes and which names are images."""

from __future__ import annotations

import sys

EXTENSIONS = frozenset(["jpg", "jpeg", "jfif", "png", "webp", "tif", "tiff", "bmp", "gif", "ppm", "pgm", "npy"])
"""File name endings (lower case, without the dot) that promise an image."""

UNREADABLE = frozenset(
    ["heic", "heif", "avif", "jp2", "j2k", "jpx", "jxl", "psd", "exr", "hdr", "tga", "dds", "dcm"]
).union(["dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf"])
"""Endings of images that are not decoded here: each is refused by name, none passes unnoticed."""

CLAIMS = EXTENSIONS | UNREADABLE
"""Endings of files that somebody means as images."""

HEAD = 16
"""Bytes of a file that :func:`sniff` needs."""

_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
    b"II+\x00": "tif",
    b"MM\x00+": "tif",
    b"\x93NUMPY": "npy",
}


class BadSample(Exception):
    """Bytes that are not an image we train on; the message says why."""


def sniff(head: bytes) -> str | None:
    """The extension that fits the bytes a file begins with, or None if they are not those of an image we read."""
    for magic, extension in _MAGIC.items():
        if head.startswith(magic):
            return extension
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    # Two letters begin many a text: a BMP's reserved bytes are zero, a PNM's type is followed by white space.
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "bmp"
    if head[:2] in (b"P5", b"P6") and head[2:3].isspace():
        return "pgm" if head[:2] == b"P5" else "ppm"
    return None


def extension_of(name: str) -> str:
    """The lower-case ending of a file name after its last dot, or an empty string."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def beginning(data: bytes) -> str:
    """How a file begins, for a message: ``is empty (0 bytes)`` or ``begins with b'<!DOCTYPE html>'``."""
    return f"begins with {data[:HEAD]!r}" if data else "is empty (0 bytes)"


def printable(name: str) -> str:
    """A file's name as text that can be printed and stored: UTF-8 whatever the locale, other bytes as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def say(text: str) -> None:
    """Print a line that may hold any name, also to a terminal or log that knows only ASCII."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
