"""A classifier on tokens of a frozen encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_vit.encoders.architectures import default_heads
from ssl_vit.encoders.base import Tokens
from ssl_vit.modules.pools import ATTENTIVE, OWN, side_by_side
from ssl_vit.modules.supervised import classifier


class ProbeHead(nn.Module):
    """One classifier.

    Args:
        stages: numbers from 1 of the blocks whose features stand side by side.
        pool: how a feature is made of tokens.
        width: of the feature.
        num_classes: columns of the logits.
        batch_norm: normalise the feature over the batch first, without affine parts.
        std: of the initial weights.
    """

    def __init__(
        self, stages: list[int], pool: str, width: int, num_classes: int, batch_norm: bool, std: float
    ) -> None:
        super().__init__()
        self.stages, self.pool = stages, pool
        self.attention: nn.Module | None = None
        if pool == ATTENTIVE:
            from timm.layers.attention_pool import AttentionPoolLatent

            self.attention = AttentionPoolLatent(width, num_heads=default_heads(width))
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        self.classifier = classifier(width, num_classes, std)

    def forward(self, tokens: dict[int, Tokens], own: Tensor) -> Tensor:
        """Logits (B, num_classes) from the tokens of each block and the encoder's own feature."""
        if self.pool == OWN:
            feature = own
        elif self.attention is not None:
            feature = self.attention(torch.cat([tokens[stage].patches for stage in self.stages], dim=2))
        else:
            feature = side_by_side([tokens[stage] for stage in self.stages], self.pool)
        with torch.autocast(feature.device.type, enabled=False):  # as released; in bf16 a thousand logits have ties
            return self.classifier(self.norm(feature.to(self.classifier.weight.dtype)))
