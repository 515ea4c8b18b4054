"""Views of supervised training: crop, flip, RandAugment or 3-Augment, colour jitter, random erasing."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from PIL import Image, ImageFilter, ImageOps
from pydantic import Field
from torch import Tensor

from ssl_vit.config import Section
from ssl_vit.data.views import CropView, from_pil, to_pil

THREE_AUGMENT = "3a"


class AugmentSection(Section):
    """The augmentation of a supervised recipe.

    Args:
        crop_scale: smallest and largest share of the image's area that a crop covers
        crop_ratio: smallest and largest aspect ratio of a crop
        crop_retry: a crop that does not fit into the image is drawn again, ten times at most; false: it is cut to the
            image, as TensorFlow's pipelines and MAE's linear probe have it
        flip: probability of a horizontal flip
        interpolation: filter that resizes a crop
        auto_augment: timm's RandAugment, e.g. rand-m9-mstd0.5-inc1; or 3a: one of grey, solarised, blurred
        color_jitter: largest relative change of brightness, contrast and saturation
        erase: probability that a random box is filled with noise
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_retry: bool = True
    flip: float = 0.5
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    auto_augment: str | None = None
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    erase: float = Field(default=0.0, ge=0, le=1)


@dataclass(frozen=True)
class SupervisedView(CropView):
    """A labelled, augmented crop, in the order of DeiT and DeiT III (arXiv 2012.12877, 2204.07118).

    Args:
        auto_augment: RandAugment in timm's words, ``"3a"`` (3-Augment) or None; both need three channels.
        color_jitter: largest relative change of brightness, contrast and saturation.
        erase: probability of Random Erasing with normal noise a pixel (arXiv 1708.04896).
        mean: per channel, of pixels in [0, 1]: what RandAugment fills with, and the mean of erasing's noise.
        std: per channel, of erasing's noise.
        crop_retry: whether a crop that does not fit is drawn again, not cut to the image.

    Raises:
        ValueError: an impossible value.
    """

    auto_augment: str | None
    color_jitter: float
    erase: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_retry: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        known = r"rand(-(m|n|p|mstd|mmax|inc)\d+(\.\d+)?)*"
        if self.auto_augment not in (None, THREE_AUGMENT) and not re.fullmatch(known, self.auto_augment):
            raise ValueError(
                f"auto_augment={self.auto_augment!r}: allowed: 3a, or RandAugment in timm's words, e.g. "
                "rand-m9-mstd0.5-inc1 (m: magnitude, n: operations an image, p: probability of each)"
            )
        if (self.auto_augment or self.color_jitter) and len(self.mean) != 3:
            raise ValueError(
                f"auto_augment={self.auto_augment!r}, color_jitter={self.color_jitter}: change colours, and these "
                f"images have {len(self.mean)} channels; allowed then: null and 0"
            )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """``image`` uint8 (C, H, W) and ``label``.

        Raises:
            ValueError: the sample has no label.
        """
        if sample["label"] < 0:
            raise ValueError("label=-1: a sample without a label; supervised training needs one for each image")
        image = self.crop(sample["image"])
        if self.auto_augment:
            image = from_pil(self._auto_augment(to_pil(image)))
        if self.color_jitter:
            image = _jitter(self.color_jitter)(image)
        if self.erase:
            image = erased(image, self.erase, self.mean, self.std)
        return {"image": image, "label": torch.tensor(sample["label"])}

    def region(self, image: Tensor) -> tuple[Tensor, bool]:
        """The part of an image that this view shows, and whether it is to be flipped."""
        if self.crop_retry:
            return super().region(image)
        height, width = image.shape[1:]
        area = height * width * random.uniform(*self.crop_scale)
        ratio = math.exp(random.uniform(*(math.log(r) for r in self.crop_ratio)))
        w, h = min(round(math.sqrt(area * ratio)), width), min(round(math.sqrt(area / ratio)), height)
        top, left = random.randint(0, height - h), random.randint(0, width - w)
        return image[:, top : top + h, left : left + w], random.random() < self.flip

    def _auto_augment(self, image: Image.Image) -> Image.Image:
        if self.auto_augment == THREE_AUGMENT:
            return three_augment(image)
        return _rand_augment(str(self.auto_augment), min(self.img_size), self.mean, self.interpolation)(image)


def three_augment(image: Image.Image) -> Image.Image:
    """One of grey, solarised (above 128) and blurred (radius 0.1 to 2), each as likely (DeiT III, section 3.2)."""
    choice = random.randrange(3)
    if choice == 0:
        return image.convert("L").convert("RGB")
    if choice == 1:
        return ImageOps.solarize(image)
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def erased(image: Tensor, probability: float, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Random Erasing of a uint8 (C, H, W) image.

    The published noise is normal after normalisation; here it is brought back to pixels, and cut at black and white.
    """
    # the box is found where the eraser has written into NaNs
    noise = _eraser(probability)(torch.full(image.shape, float("nan")))
    box = ~noise.isnan()
    if not box.any():
        return image
    scale, shift = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
    pixels = ((noise * scale + shift) * 255).round().clamp(0, 255)
    return torch.where(box, pixels.nan_to_num().to(torch.uint8), image)


@lru_cache(8)
def _rand_augment(config: str, size: int, mean: tuple[float, ...], interpolation: str) -> Any:
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.transforms import str_to_pil_interp

    hparams = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": str_to_pil_interp(interpolation),
    }
    transform = rand_augment_transform(config, hparams)
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """The upper ``bits`` of each channel; none of them is black, which newer Pillows refuse to make."""
    return ImageOps.posterize(image, min(bits, 8)) if bits > 0 else Image.new(image.mode, image.size)


@lru_cache(8)
def _jitter(strength: float) -> Any:
    from torchvision.transforms import ColorJitter

    return ColorJitter(strength, strength, strength)


@lru_cache(8)
def _eraser(probability: float) -> Any:
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(probability, mode="pixel", max_count=1, device="cpu")
