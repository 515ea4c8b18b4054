"""Images as numbers: arrays of any depth and number of channels, and their way to 8 bits."""

from __future__ import annotations

import io

import numpy as np

from ssl_vit.data.formats import BadSample


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image of more than ``max_pixels`` pixels.

    Raises:
        BadSample: it is too large.
    """
    if width * height > max_pixels:
        raise BadSample(f"has {width} x {height} pixels, more than max_pixels={max_pixels}")


def read_npy(data: bytes, max_pixels: int) -> np.ndarray:
    """The array ``(H, W, C)`` or ``(C, H, W)`` of an ``.npy`` file; never code.

    Raises:
        BadSample: it is no image, or too large.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadSample(f"is an array of shape {shape}; allowed: (H, W), (H, W, C) or (C, H, W)")
    if dtype.kind not in "buif":
        raise BadSample(f"is an array of {dtype}; allowed: bool, integers, floats")
    height, width, _ = image_shape(shape)
    check_pixels(width, height, max_pixels)
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    return array if array.ndim == 3 else array[:, :, None]


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(H, W, C) of an array ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``; of three axes channels are the shorter one."""
    height, width, channels = (*shape, 1) if len(shape) == 2 else shape
    return (width, channels, height) if height < channels else (height, width, channels)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Values of any depth as uint8, by the rules on top of decode.py.

    Raises:
        BadSample: a value is not finite.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    # Scale in float64: float32 has too few digits for wide integers.
    if values.dtype.kind in "iu":
        low, high = values.min(), values.max()
        if low >= 0 and high <= 65535:
            low, high = 0, 255 if high <= 255 and values.dtype.str[1:] != "u2" else 65535
    else:
        if not np.isfinite(values).all():
            raise BadSample("holds values that are not finite")
        low, high = (0, 1) if values.min() >= 0 and values.max() <= 1 else (values.min(), values.max())
    span = float(high) - float(low)
    return np.rint((values.astype(np.float64) - float(low)) * (255 / span if span else 0)).astype(np.uint8)


def with_channels(array: np.ndarray, in_chans: int) -> np.ndarray:
    """``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` as ``(H, W, in_chans)``, uint8.

    Raises:
        BadSample: it has other channels.
    """
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
