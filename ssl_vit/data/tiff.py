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

BITS, PHOTOMETRIC, SAMPLES, PLANAR, SAMPLE_FORMAT = 258, 262, 277, 284, 339
MIN_IS_WHITE, SEPARATE, UNSIGNED, SIGNED = 0, 2, 1, 2


def pillow_misreads(image: Image.Image, in_chans: int) -> bool:
    """Whether Pillow would drop bands that are wanted, or take the bytes of an opened image for what they are not."""
    if not isinstance(image, TiffImageFile):
        return False
    bands = len(image.getbands())
    if in_chans not in (1, 3, bands) or in_chans == image.tag_v2.get(SAMPLES, bands) != bands:
        return True
    bits = image.tag_v2.get(BITS, (1,))[0]
    signed = image.tag_v2.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == SIGNED
    separate = image.tag_v2.get(PLANAR) == SEPARATE and image.tag_v2.get(SAMPLES, bands) > 1
    return (signed and bits == 8) or (separate and bits == 16)


def holds_more(image: Image.Image) -> bool:
    """Whether an opened image has bands or pages that Pillow's mode says nothing of, or says wrong."""
    if not isinstance(image, TiffImageFile):
        return False
    return image.n_frames > 1 or pillow_misreads(image, image.tag_v2.get(SAMPLES, len(image.getbands())))


def tiff_header(data: bytes, image: Image.Image | None, max_pixels: int) -> tuple[str, int, int, int]:
    """Mode, height, width and channels of a TIFF beyond Pillow, as :func:`read_tiff` finds them.

    Args:
        data: the file.
        image: as Pillow opened it, if it did.
        max_pixels: larger images are refused.

    Raises:
        BadSample: it is too large.
    """
    with _tifffile(data) as tiff:
        page, stack = tiff.pages[0], tiff.series[0]
        check_pixels(page.imagewidth, page.imagelength, max_pixels)
        bands, pages = page.samplesperpixel, len(tiff.pages)
        # A book of scans is no image of as many channels: more memory than for RGB at the limit is not spent on that.
        is_image = bands == 1 and stack.ndim == 3 and stack.size <= 3 * max_pixels
        channels = stack.shape[0] if is_image else bands
        mode = image.mode if image and not pillow_misreads(image, bands) else f"{bands}x{page.dtype}"
        return mode if pages == 1 else f"{pages} pages of {mode}", page.imagelength, page.imagewidth, channels


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
    with _tifffile(data) as tiff:
        page = tiff.pages[0]
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


def _tifffile(data: bytes) -> Any:
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damage is an exception here, not a line for each image
    return tifffile.TiffFile(io.BytesIO(data))


def _inverted(values: np.ndarray) -> np.ndarray:
    return 1 - values if values.dtype.kind == "f" else ~values
