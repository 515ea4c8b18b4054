"""Picture sheets: what an objective makes of a few fixed images, as PNG and in TensorBoard."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ssl_vit.data.loader import EvalBatches, Pixels
from ssl_vit.data.order import derive_seed
from ssl_vit.data.views import CentreView, seed_generators
from ssl_vit.evaluation.base import Evaluation, Subject
from ssl_vit.evaluation.features import loaded

PICTURE_SEED = 3
SMALLEST_SIDE = 96


class Pictures(Evaluation):
    """One row an image, one column each picture that the objective draws of it.

    Args:
        count: images, the same ones with the same masks at every step.
    """

    labelled = False
    call = "pictures"

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise ValueError(f"count={count}: should be at least 1")
        self.count = count

    @torch.no_grad()
    def __call__(self, subject: Subject) -> dict[str, float]:
        """Saves ``pictures/pictures_XXXXXXXX.png``; no numbers."""
        batch = fixed_images(subject, self.count)
        if not batch:
            return {}
        seed_generators(derive_seed(subject.seed, PICTURE_SEED))
        with in_eval_mode(subject.objective):
            drawn = subject.objective(batch, call="pictures")
        subject.picture("pictures", sheet([shown(images, subject.pixels) for images in drawn.values()]))
        return {}


def fixed_images(subject: Subject, count: int) -> dict[str, Tensor]:
    """A normalised batch of at most ``count`` images at even distances, on the device; empty if none decodes."""
    subset = subject.images
    spread = np.arange(min(count, len(subset.samples))) * len(subset.samples) // count
    view = CentreView(subject.img_size, subject.pixels.crop_pct, subject.pixels.interpolation)
    [(batch, _)] = loaded(subject, EvalBatches(subset.index, subset.samples[spread], view, subject.pixels, count), 1)
    return subject.pixels.to_device(batch, subject.device) if batch else {}


@contextlib.contextmanager
def in_eval_mode(objective: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    was_training = objective.training
    objective.eval()
    try:
        yield
    finally:
        objective.train(was_training)


def shown(images: Tensor, pixels: Pixels) -> Tensor:
    """uint8 (B, 3, H, W) of normalised images (B, C, H, W) on any device."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (pixels.mean, pixels.std))
    return to_rgb(images.cpu().float() * std + mean)


def patch_grid(values: Tensor, picture: Tensor) -> Tensor:
    """Values of patches (B, N, C), row by row, as (B, C, h, w), for pictures (B, 3, H, W) of square patches."""
    height, width = picture.shape[-2:]
    side = math.sqrt(height * width / values.shape[1])
    return values.transpose(1, 2).unflatten(2, (round(height / side), round(width / side)))


def to_rgb(images: Tensor) -> Tensor:
    """(B, C, H, W) in [0, 1] to uint8 (B, 3, H, W): grey is repeated, of many channels the first three are shown."""
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    if images.shape[1] == 2:
        images = images[:, :1]
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def sheet(columns: list[Tensor], gap: int = 4) -> np.ndarray:
    """uint8 (H', W', 3): pictures (B, 3, H, W) of each column side by side, a row an image, small ones enlarged."""
    height, width = columns[0].shape[-2:]
    factor = max(1, -(-SMALLEST_SIDE // min(height, width)))
    rows = []
    for images in zip(*columns, strict=True):
        cells = [np.repeat(np.repeat(i.permute(1, 2, 0).numpy(), factor, 0), factor, 1) for i in images]
        padded = [np.pad(cell, ((0, gap), (0, gap), (0, 0)), constant_values=255) for cell in cells]
        rows.append(np.concatenate(padded, axis=1))
    return np.pad(np.concatenate(rows, axis=0), ((gap, 0), (gap, 0), (0, 0)), constant_values=255)
