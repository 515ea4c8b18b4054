"""A trained classifier as teacher, with its own normalisation and image size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.config import Section
from ssl_vit.data.channels import of_channels
from ssl_vit.encoders.classifiers import load_classifier
from ssl_vit.modules.target_cache import state_hash


class TeacherSection(Section):
    """The teacher of a distillation: any timm classifier.

    Args:
        weights: local file or folder: a run of train_supervised.py, a timm folder with a classifier, a state dict
        name: timm architecture; default: what the run or folder of weights says
        img_size: images, and positions of the teacher, are resized to it; default: the size it was trained at
        mean: per channel, of pixels in [0, 1]; default: as the teacher was trained
        std: per channel; default: as the teacher was trained
    """

    weights: str | None = None
    name: str | None = None
    img_size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Teacher(nn.Module):
    """Logits of a frozen classifier for images that were normalised for somebody else.

    Args:
        section: which classifier.
        num_classes: the student's.
        mean: per channel, with which the images that come were normalised.
        std: likewise.

    Raises:
        ValueError: no weights are given, they do not fit, the channels differ, or it takes no images of this size.
    """

    def __init__(
        self, section: TeacherSection, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        if section.weights is None:
            raise ValueError(
                "teacher.weights=None: allowed: a run of pipelines/train_supervised.py, or a file of weights of the "
                "timm model teacher.name, with its classifier"
            )
        chosen = load_classifier(section.weights, section.name, num_classes, len(mean), section.img_size)
        own_mean, own_std = section.mean or chosen.mean, section.std or chosen.std
        if not len(own_mean) == len(own_std) == len(mean):
            raise ValueError(
                f"teacher.mean={list(own_mean)}, teacher.std={list(own_std)}: allowed: one number for each of the "
                f"{len(mean)} channels"
            )
        self.model, self.img_size = chosen.model, chosen.img_size
        # (x * std + mean - own_mean) / own_std; plain numbers, which no cast of the module rounds
        self.scale = [s / own for s, own in zip(std, own_std, strict=True)]
        self.shift = [(m - own) / s for m, own, s in zip(mean, own_mean, own_std, strict=True)]

    def facts(self) -> dict[str, Any]:
        """What its logits depend on; plain values."""
        return {"teacher": state_hash(self), "img_size": list(self.img_size), "scale": self.scale, "shift": self.shift}

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) normalised for the student."""
        image = image * of_channels(self.scale, image) + of_channels(self.shift, image)
        if tuple(image.shape[-2:]) != self.img_size:
            image = F.interpolate(image, self.img_size, mode="bicubic", antialias=True, align_corners=False)
        return self.model(image)
