"""From a decoded sample to a view; all randomness of a sample is drawn here, from generators seeded per view.

A view is a picklable callable that runs in the loader's workers: it takes ``{"image": uint8 (C, H, W), "label": int}``
and returns a dict of tensors without a batch axis.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.data.cropping import centre, random_box, resize
from ssl_vit.data.masking import block_mask, random_mask, unit_mask


def seed_generators(seed: int) -> None:
    """Seed the three default generators (random, numpy, torch on the CPU) that views and timm draw from.

    ``torch.manual_seed`` is not used: in a worker of a CUDA build each call queues another one for later.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) or (1, H, W) as a picture."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy())


def from_pil(picture: Image.Image) -> Tensor:
    """A picture as uint8 (3, H, W) or (1, H, W)."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class CropView:
    """Random resized crop and horizontal flip.

    Args:
        img_size: (H, W) of the view.
        crop_scale: smallest and largest share of the image's area that a crop covers.
        crop_ratio: smallest and largest aspect ratio of a crop.
        flip: probability of a horizontal flip.
        interpolation: ``"bicubic"`` or ``"bilinear"``, antialiased.
    """

    img_size: tuple[int, int]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    interpolation: str

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale={list(self.crop_scale)}: allowed: 0 < smallest <= largest <= 1, e.g. [0.2, 1.0]"
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio={list(self.crop_ratio)}: allowed: 0 < smallest <= largest, e.g. [0.75, 1.33]")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip}: allowed: a probability, 0 to 1")

    def crop(self, image: Tensor) -> Tensor:
        """uint8 (C, H, W) to uint8 (C, *img_size)."""
        return self.fit(*self.region(image), self.img_size, self.interpolation)

    def region(self, image: Tensor) -> tuple[Tensor, bool]:
        """The part of an image that this view shows, in its own resolution, and whether it is to be flipped."""
        top, left, height, width = random_box(image.shape[1], image.shape[2], self.crop_scale, self.crop_ratio)
        flipped = bool(self.flip) and torch.rand(()).item() < self.flip
        return image[:, top : top + height, left : left + width], flipped

    @staticmethod
    def fit(region: Tensor, flipped: bool, size: tuple[int, int], interpolation: str) -> Tensor:
        """The picture of a region, uint8 (C, *size)."""
        view = resize(region, size, interpolation)
        return view.flip(-1) if flipped else view

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """One augmented image and its label (-1 if it has none)."""
        return {"image": self.crop(sample["image"]), "label": torch.tensor(sample["label"])}


@dataclass(frozen=True)
class MaskedView(CropView):
    """A crop and a random mask over its patches (MAE, arXiv 2111.06377).

    Args:
        grid_size: (h, w) of the patch grid.
        mask_ratio: share of the patches that are masked.
    """

    grid_size: tuple[int, int]
    mask_ratio: float

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """``image`` uint8 (C, H, W) and ``mask`` bool (N,)."""
        return {"image": self.crop(sample["image"]), "mask": random_mask(self.grid_size, self.mask_ratio)}


@dataclass(frozen=True)
class UnitMaskedView(CropView):
    """A crop and a random mask of large units (SimMIM, arXiv 2111.09886).

    Args:
        unit: side of a unit in pixels.
        stride: side of the patches that the mask is given for.
        mask_ratio: share of the units that are masked.
    """

    unit: int
    stride: int
    mask_ratio: float

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """``image`` uint8 (C, H, W) and ``mask`` bool (M,)."""
        mask = unit_mask(self.img_size, self.unit, self.stride, self.mask_ratio)
        return {"image": self.crop(sample["image"]), "mask": mask}


@dataclass(frozen=True)
class BlockMaskedPair(CropView):
    """One crop for the encoder and the tokenizer, and a block-wise mask (BEiT, arXiv 2106.08254, section 2.1).

    Both pictures have the same colours, crop and flip; only size and filter differ.

    Args:
        target_size: (H, W) of the tokenizer's picture.
        target_interpolation: filter of the tokenizer's picture.
        color_jitter: strength of brightness, contrast and saturation jitter before the crop; 0: none.
        grid_size: (h, w) of the patch grid.
        num_masked: patches to mask.
        min_block: smallest area of a block.
        max_block: largest area of a block; None: what is left to mask.
        exact: always mask exactly ``num_masked`` (BEiT v2).
    """

    target_size: tuple[int, int]
    target_interpolation: str
    color_jitter: float
    grid_size: tuple[int, int]
    num_masked: int
    min_block: int
    max_block: int | None
    exact: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.grid_size[0] * self.grid_size[1]
        if not 1 <= self.num_masked < total:
            raise ValueError(
                f"num_masked={self.num_masked}: allowed: 1 to {total - 1} of {total} patches, e.g. {total * 3 // 8}"
            )
        if not 1 <= self.min_block <= self.num_masked:
            raise ValueError(f"min_block={self.min_block}: allowed: 1 to num_masked={self.num_masked}")
        if self.max_block is not None and not self.min_block <= self.max_block <= total:
            raise ValueError(f"max_block={self.max_block}: allowed: null, or min_block={self.min_block} to {total}")

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """``image`` and ``target_image`` uint8 (C, H, W), and ``mask`` bool (N,)."""
        image = sample["image"]
        if self.color_jitter:
            from torchvision.transforms import ColorJitter

            image = ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter)(image)
        region, flipped = self.region(image)
        return {
            "image": self.fit(region, flipped, self.img_size, self.interpolation),
            "target_image": self.fit(region, flipped, self.target_size, self.target_interpolation),
            "mask": block_mask(self.grid_size, self.num_masked, self.min_block, self.max_block, exact=self.exact),
        }


@dataclass(frozen=True)
class TargetView(CropView):
    """A crop twice: normalised for the encoder's evaluation, and as it is for a tokenizer that maps pixels itself."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """``image`` and ``target_image``, both uint8 (C, H, W), the same picture."""
        view = self.crop(sample["image"])
        return {"image": view, "target_image": view}


@dataclass(frozen=True)
class CentreView:
    """The view of evaluations: shorter side to ``img_size / crop_pct``, centre crop; nothing random.

    Args:
        img_size: (H, W) of the view.
        crop_pct: share of the resized shorter side that the crop keeps.
        interpolation: ``"bicubic"`` or ``"bilinear"``, antialiased.
    """

    img_size: tuple[int, int]
    crop_pct: float
    interpolation: str

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """``image`` uint8 (C, H, W) and its label (-1 if it has none)."""
        image: Tensor = sample["image"]
        height, width = image.shape[-2:]
        target_height, target_width = self.img_size
        scale = max(target_height / height, target_width / width) / self.crop_pct
        # of a strip only the middle: whole, a line of pixels would be enlarged to gigabytes
        height = min(height, math.ceil(16 * target_height / scale))
        width = min(width, math.ceil(16 * target_width / scale))
        image = centre(image, height, width)
        size = (max(round(height * scale), target_height), max(round(width * scale), target_width))
        image = centre(resize(image, size, self.interpolation), target_height, target_width)
        return {"image": image, "label": torch.tensor(sample["label"])}
