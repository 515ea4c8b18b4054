"""The parts of VQ-KD, BEiT v2's tokenizer (arXiv 2208.06366, section 3.1), around its encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.encoders.base import create_encoder
from ssl_vit.modules.codebook import Codebook


class VQKDQuantiser(nn.Module):
    """From patches to codes: a projection and a codebook on the unit sphere.

    Args:
        token_dim: width of the patches.
        codebook_size: number of codes.
        code_dim: width of a code.
        decay: of the codes' moving averages.
        dead_below: see :class:`~ssl_vit.modules.codebook.Codebook`.
    """

    def __init__(
        self, token_dim: int, codebook_size: int, code_dim: int, decay: float = 0.99, dead_below: float = 0.0
    ) -> None:
        super().__init__()
        self.project = task_layer(token_dim, code_dim)
        self.codebook = Codebook(codebook_size, code_dim, decay, dead_below)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (B, N, d) with the patches' gradient, commitment (scalar) and their numbers, int64 (B, N)."""
        return self.codebook(in_full(self.project, patches))

    def codes_of(self, patches: Tensor) -> Tensor:
        """Numbers of the codes, int64 (B, N), of patches (B, N, D)."""
        return self.codebook.lookup(F.normalize(in_full(self.project, patches), dim=-1))

    def config(self) -> dict[str, int]:
        """Constructor arguments that build it again for use."""
        return {"codebook_size": self.codebook.size, "code_dim": self.codebook.dim}


class VQKDDecoder(nn.Module):
    """From codes to a teacher's features: a small ViT with one patch a code.

    Args:
        grid_size: (h, w) of the codes.
        code_dim: width of a code.
        target_dim: width of the teacher's features.
        embed_dim: width of the decoder.
        depth: its blocks.
        num_heads: its attention heads.
    """

    def __init__(
        self, grid_size: tuple[int, int], code_dim: int, target_dim: int, embed_dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        # the name stands for a plain ViT; all its sizes are given
        self.vit = create_encoder(
            name="vit_base_patch16_224",
            img_size=grid_size,
            patch_size=1,
            in_chans=code_dim,
            pos_embed="learned",
            **sizes,
        )
        self.regress = task_layer(embed_dim, target_dim)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, N, d) to (B, N, target_dim)."""
        return self.regress(self.vit(codes.transpose(1, 2).unflatten(2, self.vit.grid_size)).patches)


def task_layer(width: int, out: int) -> nn.Sequential:
    """Linear, tanh, Linear, as on both sides of the released codebook."""
    layers = nn.Linear(width, width), nn.Linear(width, out)
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def in_full(layer: nn.Module, patches: Tensor) -> Tensor:
    """Apply a layer in the precision of its weights, whatever the precision around it."""
    with torch.autocast(patches.device.type, enabled=False):
        return layer(patches.to(next(layer.parameters()).dtype))
