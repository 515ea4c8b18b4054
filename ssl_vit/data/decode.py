"""From an image file's bytes to pixels: every mode, depth and orientation is decided here, for training and evaluation.

The rules: EXIF orientation is applied; transparency is composited on a background, white unless told otherwise; colour
profiles are ignored; of an animation the first frame counts. Values deeper than 8 bits are scaled, never clipped:
16 bits by their full range (65535 becomes 255); wider integers likewise if all lie in 0..65535, else by the image's
own minimum and maximum; floats in [0, 1] by 255, others by the image's own minimum and maximum.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image

from ssl_vit.data.exif import ORIENTATION, jpeg_orientation, turn
from ssl_vit.data.formats import beginning, sniff

WHITE = (255, 255, 255)
MAX_PIXELS = 178_956_970
"""Pillow's own limit for an error: 512 MiB of RGB."""


_pillow_settings = threading.RLock()  # warning filters and Pillow's limit belong to all threads


class BadSample(Exception):
    """Bytes that are not an image we train on; the message says why."""


class Facts(NamedTuple):
    """What an image file holds: its true extension, Pillow's word for its mode, and its size as stored."""

    extension: str
    mode: str
    height: int
    width: int


def decode(
    data: bytes, in_chans: int = 3, background: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """Decode an image file.

    With ``in_chans`` 3 an image becomes RGB, with 1 grey (ITU-R 601). With any other number it must hold that many
    channels: ``.npy`` arrays (``(H, W, C)``, or ``(C, H, W)`` where only that fits) and TIFF bands.

    Returns:
        uint8 ``(in_chans, H, W)``, not necessarily contiguous.

    Raises:
        BadSample: whatever is wrong with the bytes.
    """
    try:
        if data[:3] == b"\xff\xd8\xff" and in_chans in (1, 3):
            pixels = _decode_jpeg(data, in_chans, max_pixels)
            if pixels is not None:
                return pixels
        with _opened(data, max_pixels) as image:
            if isinstance(image, np.ndarray):
                pixels, orientation = image, 1
            else:
                pixels, orientation = _decode_pillow(image, in_chans, background)
        array = _with_channels(to_uint8(pixels), in_chans)
        return turn(torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1), orientation)
    except BadSample:
        raise
    except Exception as error:  # decoders raise whatever they like: SyntaxError, struct.error, MemoryError ...
        raise BadSample(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def inspect(data: bytes, full: bool = True, max_pixels: int = MAX_PIXELS) -> Facts:
    """What an image file holds, after decoding all of it (``full``) or its header only.

    Raises:
        BadSample: the bytes are not an image, or break off.
    """
    extension = sniff(data)
    if extension is None:
        raise BadSample(f"is not an image, it {beginning(data)}")
    try:
        if extension == "jpg":
            height, width, space = _jpeg_header(data)
            if space in ("Gray", "YCbCr"):
                if full:
                    decode(data, max_pixels=max_pixels)
                _check_pixels(width, height, max_pixels)
                return Facts(extension, "L" if space == "Gray" else "RGB", height, width)
    except ValueError:
        pass  # Pillow has the last word on odd JPEGs
    try:
        with _opened(data, max_pixels) as image:
            if isinstance(image, np.ndarray):
                return Facts(extension, f"{image.shape[2]}x{image.dtype}", image.shape[0], image.shape[1])
            facts = Facts(extension, image.mode, image.height, image.width)
            if full:
                image.load()
            return facts
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample(f"has {width} x {height} pixels, more than max_pixels={max_pixels}")


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    return int(height), int(width), str(space)


def _decode_jpeg(data: bytes, in_chans: int, max_pixels: int) -> torch.Tensor | None:
    """The fast path; None if Pillow should try: rare colour spaces, and damage that Pillow can tell from harmless."""
    try:
        height, width, space = _jpeg_header(data)
        _check_pixels(width, height, max_pixels)
        if space not in ("Gray", "YCbCr", "RGB"):
            return None
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB" if in_chans == 3 else "GRAY")
    except ValueError:
        return None
    return turn(torch.from_numpy(pixels).permute(2, 0, 1), jpeg_orientation(data))


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image | np.ndarray]:
    """The image as Pillow opens it (header only); an array ``(H, W, C)`` of what only numpy or tifffile reads."""
    kind = sniff(data)
    if kind is None:
        raise BadSample(f"is not an image, it {beginning(data)}")
    if kind == "npy":
        yield _read_npy(data, max_pixels)
        return
    with _pillow_settings, warnings.catch_warnings():
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is checked below, before any pixel
        try:
            warnings.simplefilter("ignore")  # about odd metadata, once for each worker and image
            try:
                image = Image.open(io.BytesIO(data))
            except Image.UnidentifiedImageError:
                if kind != "tif":
                    raise BadSample(f"is no readable {kind} image, it {beginning(data)}") from None
                yield _read_tiff(data, max_pixels)
                return
            with image:
                _check_pixels(image.width, image.height, max_pixels)
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decode_pillow(image: Image.Image, in_chans: int, background: tuple[int, int, int]) -> tuple[np.ndarray, int]:
    """Pixels ``(H, W)`` or ``(H, W, C)`` of any depth, and the orientation that is still to be applied."""
    image.load()
    try:
        orientation = image.getexif().get(ORIENTATION, 1)  # after load: Pillow turns TIFFs itself and drops the tag
    except Exception:  # a broken EXIF block says nothing about the pixels
        orientation = 1
    if image.mode == "F" or image.mode.startswith("I"):
        return np.asarray(image), orientation
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


def _read_npy(data: bytes, max_pixels: int) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadSample(f"is an array of shape {shape}; allowed: (H, W), (H, W, C) or (C, H, W)")
    if dtype.kind not in "buif":
        raise BadSample(f"is an array of {dtype}; allowed: bool, integers, floats")
    height, width = shape[1:] if len(shape) == 3 and shape[0] < shape[2] else shape[:2]
    _check_pixels(width, height, max_pixels)
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    return array if array.ndim == 3 else array[:, :, None]


def _read_tiff(data: bytes, max_pixels: int) -> np.ndarray:
    """A TIFF whose bands Pillow has no mode for."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        _check_pixels(page.imagewidth, page.imagelength, max_pixels)
        array = page.asarray()
    if array.ndim == 2:
        return array[:, :, None]
    return array.transpose(1, 2, 0) if array.shape[1:] == (page.imagelength, page.imagewidth) else array


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Values of any depth as uint8, by the rules on top of this file.

    Raises:
        BadSample: a value is not finite.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    # Scale in float64: float32 has too few digits for wide integers.
    if values.dtype.kind in "iu":
        low, high = (0, 65535) if values.min() >= 0 and values.max() <= 65535 else (values.min(), values.max())
    else:
        if not np.isfinite(values).all():
            raise BadSample("holds values that are not finite")
        low, high = (0, 1) if values.min() >= 0 and values.max() <= 1 else (values.min(), values.max())
    span = float(high) - float(low)
    return np.rint((values.astype(np.float64) - float(low)) * (255 / span if span else 0)).astype(np.uint8)


def _with_channels(array: np.ndarray, in_chans: int) -> np.ndarray:
    """``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` as ``(H, W, in_chans)``."""
    array = array if array.ndim == 3 else array[:, :, None]
    if array.shape[2] == in_chans:
        return array
    if array.shape[0] == in_chans:
        return array.transpose(1, 2, 0)
    if array.shape[2] == 1 and in_chans == 3:
        return array.repeat(3, axis=2)
    if array.shape[2] == 3 and in_chans == 1:
        return np.rint(array @ np.array([0.299, 0.587, 0.114]))[:, :, None].astype(np.uint8)
    raise BadSample(f"has {array.shape[2]} channels, but in_chans={in_chans}")
