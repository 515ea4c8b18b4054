"""An objective for tests: MAE beside an EMA teacher whose features are a target, with a centre over all ranks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ssl_vit import distributed
from ssl_vit.encoders.base import Encoder
from ssl_vit.modules.ema import EMA
from ssl_vit.objectives.base import Objective, Progress
from ssl_vit.objectives.mae import MAE


class EmaMAE(MAE, Objective):
    """MAE's loss plus the distance to a moving target.

    Args:
        encoder: a plain ViT
        decoder_embed_dim: see MAE
        decoder_depth: see MAE
        decoder_num_heads: see MAE
    """

    def __init__(
        self, encoder: Encoder, decoder_embed_dim: int = 32, decoder_depth: int = 1, decoder_num_heads: int = 2
    ) -> None:
        super().__init__(
            encoder, decoder_embed_dim=decoder_embed_dim, decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
        )  # fmt: skip
        self.teacher = copy.deepcopy(encoder)
        self.ema = EMA(self.teacher)
        self.freeze(self.teacher)
        self.register_buffer("centre", torch.zeros(encoder.embed_dim))
        self.sums: list[Tensor] = []

    def encoder_filled(self) -> None:
        """The teacher starts at the student."""
        self.ema.copy(self.encoder)

    def before_step(self, progress: Progress) -> None:
        """The momentum rises."""
        self.momentum = 0.5 + 0.4 * progress.fraction

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """MAE's, and the squared distance of pooled features to the centred teacher's."""
        loss, metrics = super().loss(batch)
        with torch.no_grad():
            target = self.teacher.pool(self.teacher(batch["image"])).float()
        self.sums.append(target.sum(dim=0))
        features = self.encoder.pool(self.encoder(batch["image"])).float()
        return loss + 0.01 * (features - (target - self.centre)).square().mean(), metrics

    def after_step(self, applied: Tensor) -> None:
        """Teacher and centre, once a step."""
        total = distributed.all_sum(torch.stack(self.sums).sum(dim=0)) / 16  # the global batch of the tests
        self.sums.clear()
        self.centre.add_((total - self.centre) * (0.1 * applied))
        self.ema.update(self.encoder, self.momentum, applied)
