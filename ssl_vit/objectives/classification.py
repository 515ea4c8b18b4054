"""Supervised training of a classifier: ViT (arXiv 2010.11929), AugReg (2106.10270), DeiT (2012.12877), DeiT III."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ssl_vit.data.augment import AugmentSection, SupervisedView
from ssl_vit.encoders.base import Encoder
from ssl_vit.modules.ema import EMA
from ssl_vit.modules.supervised import Loss, Mixer, MixSection, check_classes, classifier, has_batch_norm, soft_loss
from ssl_vit.objectives.base import Objective


class Classification(Objective):
    """A linear classifier on the encoder's pooled feature, both trained on labels.

    The encoder keeps its architecture's own initialisation. With ``ema_decay`` the trained weights are ``student`` and
    ``student_head``, and ``encoder`` and ``head``, which are measured and exported, are their moving average.

    Args:
        encoder: any encoder
        num_classes: default: the classes of data.train
        loss: ce: cross-entropy; sigmoid: binary cross-entropies summed over classes (AugReg); bce: their mean, every
            class in a mixture being wholly right (DeiT III)
        label_smoothing: share of a label that is spread evenly over all classes
        representation: a linear layer and tanh before the classifier (AugReg)
        head_std: standard deviation of the classifier's initial weights; 0: zeros
        head_bias: the classifier's initial biases
        tune_blocks: train the last so many blocks of the encoder and what comes after them; 0: the classifier and the
            final norm alone; default: all of it
        ema_decay: of the moving average of all weights; null: none
        mix: Mixup and CutMix
        augment: what happens to each image

    Raises:
        ValueError: an impossible value.
    """

    level_c = ("encoder.drop_path_rate", "objective.mix.mixup", "objective.mix.cutmix")

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int | None = None,
        loss: Loss = "ce",
        label_smoothing: float = 0.1,
        representation: bool = False,
        head_std: float = 0.02,
        head_bias: float = 0.0,
        tune_blocks: int | None = None,
        ema_decay: float | None = None,
        mix: MixSection = MixSection(),  # noqa: B008
        augment: AugmentSection = AugmentSection(),  # noqa: B008
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__(encoder)
        num_classes = check_classes(num_classes)
        if loss == "bce" and label_smoothing:
            raise ValueError(f"label_smoothing={label_smoothing}: allowed with loss='bce': 0, or every class is right")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay}: allowed: between 0 and 1, e.g. 0.9999, or null")
        self.kind: Loss = loss
        self.mixer = Mixer(mix, num_classes, label_smoothing)
        self.view = SupervisedView(encoder.img_size, mean=mean, std=std, **dict(augment))
        width = encoder.embed_dim
        self.head: nn.Module = classifier(width, num_classes, head_std, head_bias)
        if representation:
            self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), self.head)
        self._keep_last(tune_blocks)
        if has_batch_norm(encoder):
            self.level_c = (*self.level_c, "encoder.name")
        self.ema_decay = ema_decay
        if ema_decay is not None:
            self.student, self.student_head = copy.deepcopy(encoder), copy.deepcopy(self.head)
            self.average = EMA(nn.ModuleList([self.encoder, self.head]))
            for part in (self.encoder, self.head):
                self.freeze(part)
            self.after_step = self._average  # pyright: ignore[reportAttributeAccessIssue]

    def _keep_last(self, blocks: int | None) -> None:
        """Freeze all of the encoder but its last ``blocks`` blocks and what comes after them."""
        encoder = self.encoder
        if blocks is None:
            return
        if not 0 <= blocks < encoder.num_layers:
            raise ValueError(f"tune_blocks={blocks}: allowed: 0 to {encoder.num_layers - 1}, or null for all")
        frozen = {n for n, _ in encoder.named_parameters() if encoder.layer_of(n) < encoder.num_layers - blocks}
        for name, parameter in encoder.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
        for name, module in encoder.named_modules():  # no drop path nor batch statistics in what does not learn
            own = {f"{name}.{n}" for n, _ in module.named_parameters()}
            if own and own <= frozen:
                self.freeze(module)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss against soft targets.

        Args:
            batch: ``image`` (B, C, H, W), normalised; ``label`` int64 (B,).
        """
        image, target = self.mixer(batch["image"], batch["label"], self.training)
        encoder, head = (self.encoder, self.head) if self.ema_decay is None else (self.student, self.student_head)
        return soft_loss(head(encoder.pool(encoder(image))), target, self.kind), {}

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, num_classes) of ``image``, from the averaged weights where there are some."""
        return self.head(self.encoder.pool(self.encode(batch)))

    def encoder_filled(self) -> None:
        """The student starts where its average does."""
        if self.ema_decay is not None:
            self.student.load_state_dict(self.encoder.state_dict())

    def no_weight_decay(self) -> set[str]:
        """Positions and tokens, as the supervised recipes have it."""
        return {f"{part}.{name}" for part in ("encoder", "student") for name in self.encoder.no_weight_decay()}

    @torch.no_grad()
    def _average(self, applied: Tensor) -> None:
        assert self.ema_decay is not None
        self.average.update(nn.ModuleList([self.student, self.student_head]), self.ema_decay, applied)
