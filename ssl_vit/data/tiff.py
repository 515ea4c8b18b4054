"""TIFF files beyond what Pillow has modes for, and the ones it opens but reads wrong."""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from ssl_vit.data.arrays import check_pixels
from ssl_vit.data.exif import ORIENTATION

BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339
MIN_IS_WHITE, SEPARATE, UNSIGNED, SIGNED = 0, 2, 1, 2


def pillow_misreads(image: Image.Image, in_chans: int) -> bool:
    """Whether Pillow would drop bands that are wanted, or take the bytes of an opened image for what they are not."""
    if not isinstance(image, TiffImageFile):
        return False
    if in_chans not in (1, 3, len(image.getbands())):
        return True
    bits = image.tag_v2.get(BITS, (1,))[0]
    signed = image.tag_v2.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == SIGNED
    separate = image.tag_v2.get(PLANAR) == SEPARATE and len(image.getbands()) > 1
    return (signed and bits == 8) or (separate and bits == 16)


def deep_values(image: Image.Image) -> np.ndarray:
    """The values (H, W) of an image whose mode is deeper than 8 bits, as whatever is in the file means them."""
    values = np.asarray(image)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return values.astype(np.uint16)  # Pillow's wide mode for 16 bits
    if not isinstance(image, TiffImageFile):
        return values
    bits = image.tag_v2.get(BITS, (1,))[0]
    if bits == 12:
        values = values << 4 | values >> 8
    elif bits == 32 and image.mode == "I" and image.tag_v2.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED:
        values = values.view(np.uint32)
    return _inverted(values) if image.tag_v2.get(PHOTOMETRIC) == MIN_IS_WHITE else values


def read_tiff(data: bytes, in_chans: int, max_pixels: int) -> tuple[np.ndarray, int]:
    """The bands of a TIFF's first page, or all pages if only together they are ``in_chans`` channels.

    Returns:
        values ``(H, W, C)``, or ``(C, H, W)`` of pages, in the file's depth; the orientation still to be applied.

    Raises:
        BadSample: it is too large.
    """
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damage is an exception here, not a line for each image
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        check_pixels(page.imagewidth, page.imagelength, max_pixels)
        if in_chans in (1, 3, page.samplesperpixel):
            values = page.asarray()
            if values.ndim == 3 and page.planarconfig == SEPARATE:
                values = values.transpose(1, 2, 0)
        else:
            series = tiff.series[0]
            check_pixels(series.size // in_chans, 1, max_pixels)
            values = series.asarray()
        if page.photometric == MIN_IS_WHITE:
            values = _inverted(values)
        orientation = page.tags.get(ORIENTATION)
    values = values if values.ndim == 3 else values[:, :, None]
    return values, orientation.value if orientation else 1


def _inverted(values: np.ndarray) -> np.ndarray:
    return 1 - values if values.dtype.kind == "f" else ~values
