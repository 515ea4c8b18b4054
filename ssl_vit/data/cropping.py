"""Where an image is cut, and how it is resized."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased resize of a uint8 (C, H, W) image to (C, *size), bilinear, bicubic or lanczos."""
    if tuple(image.shape[-2:]) == size:
        return image
    if interpolation == "lanczos":  # Pillow has the filter that BEiT was made with
        planes = [
            Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.LANCZOS) for plane in image.numpy()
        ]
        return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))
    return F.interpolate(image[None], size, mode=interpolation, antialias=True, align_corners=False)[0]


def random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of torchvision's random resized crop: its draws, with half as many small tensors.

    All of them cost a tenth of the whole sample, because decoding has just emptied the processor's caches.
    """
    draw, log_ratio = torch.empty(1), _logarithms(tuple(ratio))
    for _ in range(10):
        area = height * width * draw.uniform_(scale[0], scale[1]).item()
        aspect = draw.uniform_(*log_ratio).exp_().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)).item())
            return top, int(torch.randint(0, width - w + 1, (1,)).item()), h, w
    # none of ten fits: the middle, as large as the ratio allows
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


@lru_cache
def _logarithms(values: tuple[float, ...]) -> list[float]:
    """In float32, as torchvision has them."""
    return torch.log(torch.tensor(values)).tolist()


def centre(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of an image (C, H, W), (C, height, width)."""
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[:, top : top + height, left : left + width]
