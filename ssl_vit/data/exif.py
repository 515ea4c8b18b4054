"""EXIF orientation: which way up a camera held the picture."""

from __future__ import annotations

import struct

from torch import Tensor

ORIENTATION = 0x0112


def jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation (1-8) of a JPEG file; 1 if there is none or the EXIF block is broken.

    Reads this one tag itself: images without EXIF pay a few steps, and nothing can go wrong in a parser of all tags.
    """
    tiff = _exif_block(data)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _exif_block(data: bytes) -> bytes:
    """The EXIF segment of a JPEG, empty if there is none before the picture begins."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):
        if data[at + 1] == 0xFF:  # padding
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return data[at + 10 : end]
        at = end
    return b""


def turn(pixels: Tensor, orientation: object) -> Tensor:
    """Pixels ``(C, H, W)`` the right way up; an orientation that does not exist changes nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels.flip(2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels.flip(1)
    return pixels
