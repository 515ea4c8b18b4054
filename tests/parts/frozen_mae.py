"""An objective for tests: MAE beside a frozen teacher, whose weights nothing changes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ssl_vit.encoders.base import Encoder
from ssl_vit.objectives.base import Objective
from ssl_vit.objectives.mae import MAE


class FrozenMAE(MAE, Objective):
    """MAE's loss plus the distance to the features of a fixed encoder.

    Args:
        encoder: a plain ViT
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
        self.teacher = copy.deepcopy(encoder)
        self.freeze(self.teacher)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """MAE's, and the squared distance of pooled features."""
        loss, metrics = super().loss(batch)
        with torch.no_grad():
            target = self.teacher.pool(self.teacher(batch["image"])).float()
        features = self.encoder.pool(self.encoder(batch["image"])).float()
        return loss + 0.01 * (features - 2 * target).square().mean(), metrics
