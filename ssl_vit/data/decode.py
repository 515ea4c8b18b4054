"""From an image file's bytes to pixels: every mode, depth and orientation is decided here, for training and evaluation.

The rules: EXIF orientation is applied; transparency is composited on a background, white unless told otherwise; colour
profiles are ignored; CMYK JPEGs are taken as inverted, as they are written; of an animation the first frame counts.
Values deeper than 8 bits are scaled, never clipped: 16 bits by their full range (65535 becomes 255; of 16-bit colour
the upper byte counts); integers that are wider or signed stay as they are if all lie in 0..255, count as 16 bits if all
lie in 0..65535, else they are scaled by the image's own minimum and maximum; floats in [0, 1] by 255, others by the
image's own minimum and maximum.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image

from ssl_vit.data.arrays import check_pixels, image_shape, read_npy, to_uint8, with_channels
from ssl_vit.data.exif import ORIENTATION, jpeg_orientation, turn
from ssl_vit.data.formats import BadSample, beginning, sniff
from ssl_vit.data.tiff import deep_values, holds_more, pillow_misreads, read_tiff, tiff_header

WHITE = (255, 255, 255)
MAX_PIXELS = 178_956_970
"""Pillow's own limit for an error: 512 MiB of RGB."""
RULES = "EXIF orientation applied, transparency on white, colour profiles ignored, 16 bits by their full range"
"""What whoever feeds an exported encoder has to know."""
FAST_SPACES = ("Gray", "YCbCr", "RGB")
"""Colour spaces of the JPEGs that need no Pillow."""

_pillow_settings = threading.RLock()  # warning filters and Pillow's limit belong to all threads


class Facts(NamedTuple):
    """What an image file holds: its true extension, its mode, and its size as stored.

    The mode is Pillow's word for it; ``5xuint8`` where there is none; ``4 pages of L`` of a TIFF with several.
    """

    extension: str
    mode: str
    height: int
    width: int


@contextmanager
def _one_exception() -> Iterator[None]:
    """Decoders raise whatever they like: SyntaxError, struct.error, MemoryError ..."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


@_one_exception()
def decode(
    data: bytes, in_chans: int = 3, background: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """Decode an image file.

    With ``in_chans`` 3 an image becomes RGB, with 1 grey (ITU-R 601). With any other number it must hold that many
    channels: ``.npy`` arrays (``(H, W, C)``, or ``(C, H, W)`` where only that fits), the bands or pages of a TIFF.

    Returns:
        uint8 ``(in_chans, H, W)``, not necessarily contiguous.

    Raises:
        BadSample: whatever is wrong with the bytes.
    """
    if data[:3] == b"\xff\xd8\xff" and in_chans in (1, 3):
        pixels = _decode_jpeg(data, in_chans, max_pixels)
        if pixels is not None:
            return pixels
    values, orientation = _read(data, in_chans, background, max_pixels)
    array = with_channels(to_uint8(values), in_chans)
    return turn(torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1), orientation)


@_one_exception()
def inspect(data: bytes, full: bool = True, max_pixels: int = MAX_PIXELS) -> Facts:
    """What an image file holds, after decoding all of it (``full``) or its header only.

    Raises:
        BadSample: the bytes are not an image, or break off; ``full``: :func:`decode` refuses all that is in them.
    """
    facts, in_chans = _header(data, max_pixels)
    if full:
        decode(data, in_chans, max_pixels=max_pixels)
    return facts


def _header(data: bytes, max_pixels: int) -> tuple[Facts, int]:
    """What a file says it holds, and the channels that all of it becomes."""
    kind = _kind(data)
    if kind == "npy":
        array = read_npy(data, max_pixels)
        height, width, channels = image_shape(array.shape)
        return Facts(kind, f"{channels}x{array.dtype}", height, width), channels
    with suppress(ValueError):  # Pillow has the last word on odd JPEGs
        if kind == "jpg":
            height, width, space = _jpeg_header(data)
            if space in FAST_SPACES:
                check_pixels(width, height, max_pixels)
                return Facts(kind, "L" if space == "Gray" else "RGB", height, width), 3
    with _opened(data, kind, max_pixels) as image:
        if image is None or holds_more(image):
            mode, height, width, channels = tiff_header(data, image, max_pixels)
            return Facts(kind, mode, height, width), channels
        return Facts(kind, image.mode, image.height, image.width), 3


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    return int(height), int(width), str(space)


def _decode_jpeg(data: bytes, in_chans: int, max_pixels: int) -> torch.Tensor | None:
    """The fast path; None if Pillow should try: rare colour spaces, and damage that Pillow can tell from harmless."""
    try:
        height, width, space = _jpeg_header(data)
        check_pixels(width, height, max_pixels)
        if space not in FAST_SPACES:
            return None
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB" if in_chans == 3 else "GRAY")
    except ValueError:
        return None
    return turn(torch.from_numpy(pixels).permute(2, 0, 1), jpeg_orientation(data))


def _kind(data: bytes) -> str:
    kind = sniff(data)
    if kind is None:
        raise BadSample(f"is not an image, it {beginning(data)}")
    return kind


def _read(data: bytes, in_chans: int, background: tuple[int, int, int], max_pixels: int) -> tuple[np.ndarray, int]:
    """Values ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` of any depth, and the orientation still to be applied."""
    kind = _kind(data)
    if kind == "npy":
        return read_npy(data, max_pixels), 1
    with _opened(data, kind, max_pixels) as image:
        if image is None or pillow_misreads(image, in_chans):
            return read_tiff(data, in_chans, max_pixels)
        return _decode_pillow(image, in_chans, background)


@contextmanager
def _opened(data: bytes, kind: str, max_pixels: int) -> Iterator[Image.Image | None]:
    """The image as Pillow opens it, header only; None: a TIFF that only tifffile reads."""
    with _quiet_pillow():
        try:
            image = Image.open(io.BytesIO(data))
        except Image.UnidentifiedImageError:
            if kind != "tif":
                raise BadSample(f"is no readable {kind} image, it {beginning(data)}") from None
            yield None
            return
        with image:
            check_pixels(image.width, image.height, max_pixels)
            yield image


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """No warnings about odd metadata, once for each worker and image; no limit but ours, checked before any pixel."""
    with _pillow_settings, warnings.catch_warnings():
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            warnings.simplefilter("ignore")
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decode_pillow(image: Image.Image, in_chans: int, background: tuple[int, int, int]) -> tuple[np.ndarray, int]:
    """As :func:`_read`, of an opened image."""
    image.load()
    try:
        orientation = image.getexif().get(ORIENTATION, 1)  # after load: Pillow turns TIFFs itself and drops the tag
    except Exception:  # a broken EXIF block says nothing about the pixels
        orientation = 1
    if image.mode == "F" or image.mode.startswith("I"):
        values = deep_values(image)
        key = image.info.get("transparency")
        if key is None:
            return values, orientation
        colours = to_uint8(values)[:, :, None].repeat(3, axis=2)
        colours[values == key] = background
        return colours, orientation
    if in_chans not in (1, 3):
        if image.mode in ("P", "PA", "1"):
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        return np.asarray(image), orientation
    if "A" in image.mode.upper().replace("LAB", "") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if in_chans == 1:
        image = image.convert("L")
    return np.asarray(image), orientation
