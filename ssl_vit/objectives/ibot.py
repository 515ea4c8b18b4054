"""iBOT (arXiv 2111.07832): self-distillation of class tokens across views and of masked patches within a view."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_vit.data.multicrop import ColourView, MaskRule, MultiCropView
from ssl_vit.encoders.base import Encoder
from ssl_vit.modules.ema import EMA
from ssl_vit.modules.heads import ProjectionHead
from ssl_vit.modules.patches import gather_patches
from ssl_vit.modules.self_distillation import (
    Centre,
    check_temperatures,
    collapse,
    cross_view_loss,
    entropy,
    masked_loss,
    student_log_probabilities,
    teacher_probabilities,
)
from ssl_vit.objectives.base import Objective, Progress


class IBOT(Objective):
    """Image BERT with an online tokenizer (sections 3.2 and 4, appendix C).

    ``encoder`` is the teacher's: the average is what is measured and exported. The student sees masked large views and
    whole small ones, the teacher whole large ones. Logits of patches are computed only where a patch can be masked; the
    teacher's centre still is that of all patches, since the last layer of the head is linear.

    Args:
        encoder: a plain ViT with a class token; its drop path is the student's
        out_dim: prototypes of the head, which class token and patches share
        hidden_dim: width of the head's two hidden layers
        bottleneck_dim: width of the head's last but one layer
        norm_last_layer: keep the length of the prototypes at 1; steadier, a little worse
        freeze_last_layer: epochs in which the prototypes rest
        momentum: share of the teacher that a step keeps, rising to 1 on half a cosine
        student_temp: temperature of the student
        teacher_temp: temperature of the teacher's class token at the start and after the warm-up
        teacher_patch_temp: the same for patches
        warmup_teacher_temp_epochs: epochs over which these temperatures rise, a step for each epoch
        centre_momentum: share of the centres that a step keeps
        cls_weight: of the loss over class tokens
        patch_weight: of the loss over masked patches
        mask_ratio: shares of masked patches, one of which is drawn for each large view
        mask_variance: how far each share varies either way
        mask_shape: block: block-wise; random: patches for themselves
        local_crops: small views of an image
        local_size: height and width of a small view in pixels
        global_scale: smallest and largest share of the image's area that a large view covers
        local_scale: the same for small views
        crop_ratio: smallest and largest aspect ratio of a crop
        flip: probability of a horizontal flip
        interpolation: filter that resizes a crop
        jitter: brightness, contrast, saturation and hue of the colour jitter
        jitter_prob: probability of the colour jitter
        grey: probability of a grey view
        blur: probability of a blur in the first large, the second large and the small views
        blur_sigma: smallest and largest standard deviation of the blur in pixels
        solarise: probability of solarisation in the second large view
        init_std: standard deviation of the encoder's initial linear layers, as published for widths from 384

    Raises:
        ValueError: an encoder without class token or of one image size, or an impossible value.
    """

    def __init__(
        self,
        encoder: Encoder,
        out_dim: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        freeze_last_layer: int = 1,
        momentum: float = 0.996,
        student_temp: float = 0.1,
        teacher_temp: tuple[float, float] = (0.04, 0.07),
        teacher_patch_temp: tuple[float, float] = (0.04, 0.07),
        warmup_teacher_temp_epochs: int = 30,
        centre_momentum: float = 0.9,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        mask_ratio: tuple[float, ...] = (0.0, 0.3),
        mask_variance: tuple[float, ...] = (0.0, 0.2),
        mask_shape: Literal["block", "random"] = "block",
        local_crops: int = 10,
        local_size: int = 96,
        global_scale: tuple[float, float] = (0.25, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.25),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        jitter_prob: float = 0.8,
        grey: float = 0.2,
        blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarise: float = 0.2,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(encoder)
        if getattr(encoder.model, "cls_token", None) is None:
            raise ValueError(f"encoder.name={encoder.name!r}: iBOT needs a class token; allowed: vit_* with one")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: allowed: 0 to 1, e.g. 0.996")
        check_temperatures(
            student_temp=(student_temp,), teacher_temp=teacher_temp, teacher_patch_temp=teacher_patch_temp
        )
        self.momentum_start, self.student_temp = momentum, student_temp
        self.temperatures, self.warmup_epochs = (teacher_temp, teacher_patch_temp), warmup_teacher_temp_epochs
        self.freeze_last_layer, self.cls_weight, self.patch_weight = freeze_last_layer, cls_weight, patch_weight
        large = ColourView(
            encoder.img_size, global_scale, crop_ratio, flip, interpolation,
            jitter, jitter_prob, grey, blur[0], blur_sigma,
        )  # fmt: skip
        second = replace(large, blur=blur[1], solarise=solarise)
        small = replace(large, img_size=(local_size, local_size), crop_scale=local_scale, blur=blur[2])
        mask = MaskRule(encoder.grid_size, mask_ratio, mask_variance, mask_shape)
        self.view = MultiCropView(large, second, small, local_crops, mask)
        self.view.check(encoder.in_chans, encoder.patch_size)
        nn.init.trunc_normal_(encoder.model.cls_token, std=0.02)
        for module in encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
        self.student = copy.deepcopy(encoder)
        if local_crops:
            self.student.take_any_size()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.token_dim))
        self.student_head = ProjectionHead(encoder.token_dim, out_dim, hidden_dim, bottleneck_dim, norm_last_layer)
        self.teacher_head = copy.deepcopy(self.student_head)
        self.cls_centre, self.patch_centre = Centre(out_dim, centre_momentum), Centre(out_dim, centre_momentum)
        self.freeze(self.encoder)
        self.freeze(self.teacher_head)
        self.averages = ((EMA(self.encoder), self.student), (EMA(self.teacher_head), self.student_head))
        self.before_step(Progress(0, 1, 0.0, 1.0, 0.0))

    def encoder_filled(self) -> None:
        """The student starts where the teacher does."""
        self.student.load_state_dict(self.encoder.state_dict())

    def views(self, img_size: tuple[int, int]) -> MultiCropView:
        """Two large views with masks and several small ones (section 4.1, "Pre-Training Setup")."""
        patch, view = self.encoder.patch_size, self.view
        first, second = (replace(v, img_size=img_size) for v in (view.first, view.second))
        mask = replace(view.mask, grid_size=(img_size[0] // patch, img_size[1] // patch))
        return replace(view, first=first, second=second, mask=mask)

    def before_step(self, progress: Progress) -> None:
        """Temperatures and resting prototypes by the epoch, the teacher's momentum by the step, as published."""
        epoch, warmup = int(progress.epoch), self.warmup_epochs
        share = 1.0 if epoch >= warmup else epoch / max(warmup - 1, 1)
        self.cls_temp, self.patch_temp = (start + (end - start) * share for start, end in self.temperatures)
        self.momentum = 1 - (1 - self.momentum_start) * (1 + math.cos(math.pi * progress.fraction)) / 2
        self.resting = self.student_head.last_layer() if epoch < self.freeze_last_layer else ()
        self.cls_centre.reset()
        self.patch_centre.reset()

    def after_step(self, applied: Tensor) -> None:
        """Teacher and centres follow."""
        for average, student in self.averages:
            average.update(student, self.momentum, applied)
        self.cls_centre.step(applied)
        self.patch_centre.step(applied)

    def symptom(self, values: dict[str, float]) -> str | None:
        """A collapse, see :func:`ssl_vit.modules.self_distillation.collapse`."""
        return collapse(values, self.cls_centre.value.numel())

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of class tokens across views and of masked patches within a view.

        Args:
            batch: ``global_views`` (B, 2, C, H, W) and, if there are any, ``local_views`` (B, n, C, h, w), normalised;
                ``mask`` bool (B, 2, N), True = masked.

        Returns:
            The loss, and what tells a collapse: entropy of the teacher near 0 or ln K, KL divergence near 0, a growing
            centre.
        """
        large, mask = batch["global_views"].flatten(0, 1), batch["mask"].flatten(0, 1)  # (2B, C, H, W), (2B, N)
        chosen = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.view.mask.most]  # (2B, L)
        target_cls, target_patches = self._targets(large, chosen)
        weight = mask.gather(1, chosen).to(target_patches) / mask.sum(dim=1, keepdim=True).clamp(min=1)  # (2B, L)

        tokens = self.student(large, mask, self.mask_token)
        cls = tokens.prefix[:, 0].unflatten(0, (-1, 2))  # (B, 2, D)
        if self.view.num_small:
            small = batch["local_views"]
            seen = self.student(small.flatten(0, 1)).prefix[:, 0]
            cls = torch.cat([cls, seen.unflatten(0, small.shape[:2])], dim=1)  # (B, 2 + n, D)
        patches = gather_patches(tokens.patches, chosen)  # (2B, L, D)
        log_cls = student_log_probabilities(self.student_head(cls), self.student_temp)
        log_patches = student_log_probabilities(self.student_head(patches), self.student_temp)
        cls_loss = cross_view_loss(target_cls, log_cls)
        patch_loss = masked_loss(target_patches, log_patches, weight)

        masked_views = weight.sum().clamp(min=1)
        cls_entropy = entropy(target_cls).mean()
        patch_entropy = (entropy(target_patches) * weight).sum() / masked_views
        metrics = {
            "cls_loss": cls_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "cls_entropy": cls_entropy,
            "patch_entropy": patch_entropy,
            "cls_kl": cls_loss.detach() - cls_entropy,
            "patch_kl": patch_loss.detach() * len(weight) / masked_views - patch_entropy,
            "cls_centre_norm": self.cls_centre.value.norm(),
            "patch_centre_norm": self.patch_centre.value.norm(),
        }
        return self.cls_weight * cls_loss + self.patch_weight * patch_loss, metrics

    @torch.no_grad()
    def _targets(self, large: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities of class tokens (B, 2, K) and of the patches ``chosen`` (2B, L, K)."""
        head = self.teacher_head
        tokens = self.encoder(large)
        cls = head(tokens.prefix[:, 0])  # (2B, K)
        units = head.bottleneck(tokens.patches)  # (2B, N, bottleneck)
        if self.training:
            self.cls_centre.add(cls.sum(dim=0), len(cls))
            self.patch_centre.add(head.prototypes(units.mean(dim=1)).sum(dim=0), len(units))
        patches = head.prototypes(gather_patches(units, chosen))
        targets = teacher_probabilities(cls, self.cls_centre.value, self.cls_temp).unflatten(0, (-1, 2))
        return targets, teacher_probabilities(patches, self.patch_centre.value, self.patch_temp)
