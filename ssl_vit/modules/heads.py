"""Projection heads of self-distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.encoders.architectures import check_sizes


class ProjectionHead(nn.Module):
    """The head of DINO and iBOT (arXiv 2104.14294, section 3.1 and appendix C): an MLP of three layers, L2
    normalisation, and a weight-normalised layer without bias onto the prototypes.

    Args:
        in_dim: width of the tokens.
        out_dim: number of prototypes.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width of what is normalised.
        norm_last_layer: keep the length of the prototypes at 1, else it is trained.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        check_sizes("head_", out_dim=out_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        # two-dimensional both, so that weight decay treats them as the published code does
        self.weight_v = nn.Parameter(torch.empty(out_dim, bottleneck_dim))
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        nn.init.uniform_(self.weight_v, -(bottleneck_dim**-0.5), bottleneck_dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., in_dim) to logits (..., out_dim)."""
        return self.prototypes(self.bottleneck(tokens))

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """(..., in_dim) to unit vectors (..., bottleneck_dim)."""
        return F.normalize(self.mlp(tokens), dim=-1)

    def prototypes(self, unit: Tensor) -> Tensor:
        """Products with the prototypes, (..., bottleneck_dim) to (..., out_dim); linear, and never in low precision.

        The logits are divided by temperatures of 0.04, which would blow up bfloat16's rounding to several percent.
        """
        with torch.autocast(unit.device.type, enabled=False):
            weight = self.weight_g * F.normalize(self.weight_v, dim=1)
            return F.linear(unit.to(weight.dtype), weight)

    def last_layer(self) -> tuple[nn.Parameter, ...]:
        """The trainable parameters of the prototypes."""
        return tuple(p for p in (self.weight_v, self.weight_g) if p.requires_grad)
