"""DeiT (arXiv 2012.12877): a distillation token learns from a teacher, the class token from the labels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.data.augment import AugmentSection, SupervisedView
from ssl_vit.encoders.base import Encoder
from ssl_vit.modules.supervised import Mixer, MixSection, check_classes, classifier, soft_loss
from ssl_vit.modules.teacher import Teacher, TeacherSection
from ssl_vit.objectives.base import Objective


class DeiT(Objective):
    """Distillation through attention (section 4).

    The teacher sees the images that the student sees, mixed and erased as they are, in its own normalisation and size.
    It is part of every checkpoint, so that a run goes on with the teacher it began with.

    Args:
        encoder: a ViT with class and distillation token; without distillation_token any encoder
        num_classes: default: the classes of data.train
        teacher: whom the distillation token learns from
        distillation_token: false: the one classifier on the encoder's feature learns from labels and teacher (the
            paper's usual distillation, and a fine-tuning with a teacher)
        distillation: hard: cross-entropy to the teacher's first class; soft: divergence from its distribution
        alpha: share of the distillation in the loss
        temperature: of both distributions, in soft distillation
        label_smoothing: share of a label that is spread evenly over all classes; not for the teacher's
        head_std: standard deviation of both classifiers' initial weights
        mix: Mixup and CutMix
        augment: what happens to each image
        target_cache: folder in which the teacher's logits are kept (with data.fixed_passes, without Mixup and CutMix)

    Raises:
        ValueError: an encoder without exactly two prefix tokens, no teacher, or an impossible value.
    """

    level_c = ("encoder.drop_path_rate", "objective.mix.mixup", "objective.mix.cutmix")

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int | None = None,
        teacher: TeacherSection = TeacherSection(),  # noqa: B008
        distillation_token: bool = True,
        distillation: Literal["hard", "soft"] = "hard",
        alpha: float = 0.5,
        temperature: float = 3.0,
        label_smoothing: float = 0.1,
        head_std: float = 0.02,
        mix: MixSection = MixSection(),  # noqa: B008
        augment: AugmentSection = AugmentSection(),  # noqa: B008
        target_cache: str | None = None,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__(encoder)
        if distillation_token and encoder.num_prefix_tokens != 2:
            raise ValueError(
                f"encoder.name={encoder.name!r}: has {encoder.num_prefix_tokens} prefix tokens, and DeiT needs a class "
                "and a distillation token; allowed: deit_{tiny,small,base}_distilled_patch16_224, or "
                "distillation_token=false"
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha}: allowed: 0 to 1; published: 0.5 (hard), 0.1 (soft)")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: allowed: above 0; published: 3.0")
        if target_cache and mix.prob and (mix.mixup or mix.cutmix):
            raise ValueError(
                f"target_cache={target_cache!r}: allowed with mix.mixup=0 and mix.cutmix=0 only (now {mix.mixup} and "
                f"{mix.cutmix}): mixtures never come twice"
            )
        self.target_cache = target_cache
        num_classes = check_classes(num_classes)
        self.distillation, self.alpha, self.temperature = distillation, alpha, temperature
        self.mixer = Mixer(mix, num_classes, label_smoothing)
        self.view = SupervisedView(encoder.img_size, mean=mean, std=std, **dict(augment))
        self.head = classifier(encoder.embed_dim, num_classes, head_std)
        self.head_dist = classifier(encoder.token_dim, num_classes, head_std) if distillation_token else None
        self.teacher = Teacher(teacher, num_classes, mean, std)
        self.freeze(self.teacher)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """``(1 - alpha)`` of the class token's loss plus ``alpha`` of the distillation token's.

        Args:
            batch: ``image`` (B, C, H, W), normalised; ``label`` int64 (B,).
        """
        image, target = self.mixer(batch["image"], batch["label"], self.training)
        logits, distilled = self._both(image)
        labels = soft_loss(logits, target, "ce")
        dtype = torch.promote_types(distilled.dtype, torch.float32)  # numpy, which keeps the cache, has no bfloat16
        teacher = self.cached(batch, lambda: self.teacher(image).to(dtype))
        distillation = self._distillation(distilled.to(dtype), teacher)
        loss = (1 - self.alpha) * labels + self.alpha * distillation
        return loss, {"label_loss": labels.detach(), "distillation_loss": distillation.detach()}

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean of both heads' logits, (B, num_classes)."""
        logits, distilled = self._both(batch["image"])
        return (logits + distilled) / 2

    def target_facts(self) -> dict[str, Any]:
        """The teacher: its weights, size and normalisation."""
        return self.teacher.facts()

    def no_weight_decay(self) -> set[str]:
        """Positions and tokens, as published."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def _both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class and of the distillation token, (B, num_classes) each; with one classifier the same."""
        tokens = self.encoder(image)
        if self.head_dist is None:
            logits = self.head(self.encoder.pool(tokens))
            return logits, logits
        return self.head(tokens.prefix[:, 0]), self.head_dist(tokens.prefix[:, 1])

    def _distillation(self, logits: Tensor, teacher: Tensor) -> Tensor:
        if self.distillation == "hard":
            return F.cross_entropy(logits, teacher.argmax(dim=1))
        student, teacher = (each.div(self.temperature).log_softmax(dim=1) for each in (logits, teacher))
        # the published code divides by the number of logits, not of images
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
        return divergence * self.temperature**2 / logits.numel()
