"""What supervised objectives share: Mixup and CutMix, their soft targets, the losses against these, and classifiers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.config import InputError, Section

Loss = Literal["ce", "sigmoid", "bce"]


class MixSection(Section):
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899).

    Args:
        mixup: alpha of Mixup's beta distribution; 0: no Mixup
        cutmix: alpha of CutMix's beta distribution; 0: no CutMix
        prob: share of the batches (or pairs, or images) that are mixed
        switch_prob: share of the mixed that get CutMix, where both are on
        mode: what draws a mixture of its own: a micro-batch, or a pair of images, or each image (elem), which make a
            GPU wait for the host in each step
    """

    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    prob: float = Field(default=1.0, ge=0, le=1)
    switch_prob: float = Field(default=0.5, ge=0, le=1)
    mode: Literal["batch", "pair", "elem"] = "batch"


class Mixer:
    """Mixes a batch with its own reverse (timm's Mixup) and gives it soft targets.

    Args:
        section: which mixtures.
        num_classes: columns of the targets.
        smoothing: share of each label that is spread evenly over all classes.
    """

    def __init__(self, section: MixSection, num_classes: int, smoothing: float) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(
                f"label_smoothing={smoothing}: allowed: 0 to below 1; nearest: {0.0 if smoothing < 0 else 0.1}"
            )
        self.num_classes, self.smoothing, self.mixup = num_classes, smoothing, None
        if section.mixup or section.cutmix:
            from timm.data.mixup import Mixup

            self.mixup = Mixup(
                section.mixup, section.cutmix, prob=section.prob, switch_prob=section.switch_prob, mode=section.mode,
                label_smoothing=0.0, num_classes=num_classes,
            )  # fmt: skip

    def __call__(self, image: Tensor, label: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Images and targets for a loss; nothing is mixed outside training.

        Draws from numpy's default generator, which the trainer seeds for each step and process.

        Args:
            image: (B, C, H, W), normalised; it is left as it is.
            label: int64 (B,).
            training: whether the objective is being trained.

        Returns:
            (B, C, H, W) and (B, num_classes), rows summing to 1.

        Raises:
            InputError: a batch of an odd number of images, which cannot be paired.
        """
        if self.mixup is None or not training:
            return image, self._smoothed(F.one_hot(label, self.num_classes).to(image.dtype))
        if len(image) % 2:
            raise InputError(
                f"micro-batch of {len(image)} images: Mixup and CutMix pair them; give an even run.micro_batch_size, "
                "or objective.mix.mixup=0 objective.mix.cutmix=0"
            )
        image, target = self.mixup(image.clone(), label)
        return image, self._smoothed(target.to(image.dtype))

    def _smoothed(self, target: Tensor) -> Tensor:
        return target * (1 - self.smoothing) + self.smoothing / self.num_classes


def soft_loss(logits: Tensor, target: Tensor, kind: Loss) -> Tensor:
    """The loss of a batch against soft targets, at least in float32.

    Args:
        logits: (B, num_classes).
        target: (B, num_classes).
        kind: ``ce``: cross-entropy; ``sigmoid``: binary cross-entropies, summed over the classes (AugReg, arXiv
            2106.10270); ``bce``: their mean over the classes, each class in the mixture being wholly right (DeiT III).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = target.to(logits.dtype)
    if kind == "ce":
        return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1).mean()
    return F.binary_cross_entropy_with_logits(logits, (target > 0).to(logits.dtype))


def classifier(width: int, num_classes: int, std: float = 0.02, bias: float = 0.0) -> nn.Linear:
    """A linear layer to logits: weights truncated normal (zeros where ``std`` is 0), one number as bias."""
    head = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(head.weight, std=std) if std else nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, bias)
    return head


def check_classes(num_classes: int | None) -> int:
    """The number of classes, which the data fills in where a recipe leaves it open.

    Raises:
        ValueError: it is not known, or below 2.
    """
    if num_classes is None or num_classes < 2:
        raise ValueError(
            f"num_classes={num_classes}: allowed: whole numbers from 2; a recipe's null: those of data.train"
        )
    return num_classes


def has_batch_norm(network: nn.Module) -> bool:
    """Whether images of a micro-batch influence each other in training."""
    types: Any = nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, types) for module in network.modules())
