"""The parts of a discrete VAE on pixels (DALL-E, arXiv 2102.12092, section 2.1) around its encoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.modules.vqkd import in_full


class DVAEQuantiser(nn.Module):
    """From patches to codes: logits over the codes, relaxed samples of them in training (Gumbel-softmax).

    Args:
        token_dim: width of the patches.
        codebook_size: number of codes.
        code_dim: width of a code.

    Attributes:
        temperature: of the relaxation; towards 0 samples become one-hot.
    """

    def __init__(self, token_dim: int, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        if codebook_size < 2 or code_dim < 1:
            raise ValueError(
                f"codebook_size={codebook_size}, code_dim={code_dim}: allowed: whole numbers from 2 and from 1"
            )
        self.to_logits = nn.Linear(token_dim, codebook_size)
        self.codes = nn.Parameter(torch.randn(codebook_size, code_dim) * code_dim**-0.5)
        self.temperature = 1.0

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled codes (in evaluation the likeliest) and their divergence.

        Returns:
            (B, N, d); the divergence of the distributions over codes from the uniform one, summed over an image's
            patches, mean over images; the numbers of the likeliest codes, int64 (B, N).
        """
        logits = in_full(self.to_logits, patches)  # (B, N, K)
        numbers = logits.argmax(dim=-1)
        if self.training:
            chosen = F.gumbel_softmax(logits, tau=self.temperature, dim=-1) @ self.codes.to(logits.dtype)
        else:
            chosen = self.codes[numbers]
        log_q = logits.log_softmax(dim=-1)
        divergence = (log_q.exp() * log_q).sum(dim=-1) + math.log(logits.shape[-1])
        return chosen, divergence.sum(dim=1).mean(), numbers

    def codes_of(self, patches: Tensor) -> Tensor:
        """Numbers of the likeliest codes, int64 (B, N), of patches (B, N, D)."""
        return in_full(self.to_logits, patches).argmax(dim=-1)

    def config(self) -> dict[str, int]:
        """Constructor arguments that build it again for use."""
        return {"codebook_size": self.codes.shape[0], "code_dim": self.codes.shape[1]}


class DVAEDecoder(nn.Module):
    """From codes to pixels: residual convolutions at the resolution of the codes, then each becomes its patch.

    Args:
        grid_size: (h, w) of the codes.
        code_dim: width of a code.
        patch_size: side of a patch in pixels.
        in_chans: channels of a picture.
        width: channels of the decoder.
        depth: its residual blocks.
    """

    def __init__(
        self, grid_size: tuple[int, int], code_dim: int, patch_size: int, in_chans: int, width: int, depth: int
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.widen = nn.Conv2d(code_dim, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))
            for _ in range(depth)
        )
        self.to_pixels = nn.Conv2d(width, in_chans * patch_size**2, 1)
        self.patch_size = patch_size

    def forward(self, codes: Tensor) -> Tensor:
        """(B, N, d) to normalised pixels (B, C, H, W)."""
        hidden = self.widen(codes.transpose(1, 2).unflatten(2, self.grid_size))
        for block in self.blocks:
            hidden = hidden + block(hidden) / len(self.blocks)
        return F.pixel_shuffle(self.to_pixels(hidden.relu()), self.patch_size)
