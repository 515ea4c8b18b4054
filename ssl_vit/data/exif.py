"""EXIF orientation: which way up a camera held the picture."""

from __future__ import annotations

import struct

from torch import Tensor

ORIENTATION = 0x0112


def jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation (1-8) of a JPEG file; 1 if there is none or the EXIF block is broken.

    Reads this one tag itself: images without EXIF pay a short search, and nothing can go wrong in a parser of all tags.
    """
    start = data.find(b"Exif\0\0", 0, 65536)
    if start < 0:
        return 1
    tiff = data[start + 6 : start + 6 + 65536]
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


def turn(pixels: Tensor, orientation: object) -> Tensor:
    """Pixels ``(C, H, W)`` the right way up; an orientation that does not exist changes nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels.flip(2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels.flip(1)
    return pixels
