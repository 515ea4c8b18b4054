"""What packing does with each image: read it, look whether it is one, and make it smaller if that was asked for."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from ssl_vit.config import InputError
from ssl_vit.data.decode import BadSample, Facts, decode, inspect
from ssl_vit.data.formats import UNREADABLE, extension_of, printable, sniff
from ssl_vit.data.images import Images

RESIZED_MODES = ("L", "RGB", "CMYK", "YCbCr")
"""Modes that a JPEG holds; transparency, palettes, deep and many channels would lose more than JPEG loses."""


class CheckedImage(NamedTuple):
    """An image that was looked at; ``reason`` says why it is refused, if it is."""

    position: int
    name: str
    label: int
    data: bytes = b""
    extension: str = ""
    mode: str = ""
    height: int = 0
    width: int = 0
    resized_from: tuple[int, int, int] | None = None  # height, width and bytes before
    reason: str = ""


@dataclass
class Check:
    """Reads and checks the images at some positions of the order; called in the workers.

    Args:
        images: the source.
        order: the image at each position, int64 ``(N,)``.
        verify: decode each image in full, not only its header.
        resize: short side above which images are re-encoded, or None.
        quality: of their JPEG.
        max_pixels: larger images are refused.
    """

    images: Images
    order: np.ndarray
    verify: bool
    resize: int | None
    quality: int
    max_pixels: int

    def __call__(self, positions: range) -> list[CheckedImage]:
        """The images at these positions."""
        return [self._checked(position) for position in positions]

    def _checked(self, position: int) -> CheckedImage:
        i = int(self.order[position])
        found = CheckedImage(position, printable(self.images.name(i)), self.images.labels[i])
        try:
            data = self.images.read(i)
            # Raw photographs begin like TIFFs, and what they hold first is a thumbnail.
            if (kind := extension_of(found.name)) in UNREADABLE and sniff(data) in (None, "tif"):
                raise BadSample(f"is a {kind} file, which is not decoded here; convert it to JPEG, PNG or TIFF")
            facts = inspect(data, full=False, max_pixels=self.max_pixels)
            if self.resize and min(facts.height, facts.width) > self.resize and facts.mode in RESIZED_MODES:
                smaller = resized(data, facts, self.resize, self.quality, self.max_pixels)
                before = (facts.height, facts.width, len(data))
                return found._replace(data=smaller, resized_from=before, **inspect(smaller, full=False)._asdict())
            if self.verify:
                inspect(data, max_pixels=self.max_pixels)
        except InputError:
            raise
        except (BadSample, OSError, ValueError) as error:
            return found._replace(reason=printable(str(getattr(error, "strerror", None) or error)))
        return found._replace(data=data, **facts._asdict())


def resized(data: bytes, facts: Facts, short_side: int, quality: int, max_pixels: int) -> bytes:
    """An image as a baseline JPEG (4:2:0, optimised Huffman tables) with a smaller short side.

    The pixels are those that training decodes, so neither orientation nor colour profile is written again.

    Raises:
        BadSample: it does not decode.
    """
    grey = facts.mode == "L"
    pixels = decode(data, in_chans=1 if grey else 3, max_pixels=max_pixels)
    pixels = pixels[0] if grey else pixels.permute(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(pixels.numpy()))
    scale = short_side / min(image.size)
    smaller = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smaller.save(file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True, progressive=False)
    return file.getvalue()
