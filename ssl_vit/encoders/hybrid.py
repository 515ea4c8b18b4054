"""Hybrid Vision Transformers of timm: patches of a residual network's features instead of pixels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ssl_vit.encoders.architectures import hybrid_names, timm_name
from ssl_vit.encoders.base import Tokens
from ssl_vit.encoders.vit import ViT


class Hybrid(ViT):
    """ViT on a convolutional stem (arXiv 2010.11929, section 3.1, "Hybrid Architecture") as timm builds it.

    Convolutions see beyond a patch, so what is masked or dropped is masked in the image, before the stem: pixels become
    0, the mean colour. Dropping patches still shortens the transformer, but not the stem.

    Args:
        name: timm architecture, e.g. vit_base_r50_s16_224; the size at its end may be left out
        img_size: height and width in pixels, or one number for both
        feature_patch_size: side of a patch in places of the stem's output; default: the architecture's
        in_chans: channels of the image
        embed_dim: width; default: the architecture's
        depth: number of blocks; default: the architecture's
        num_heads: attention heads; default: the architecture's, or with embed_dim given as many as make heads 64
            wide (or the next smaller width that divides it)
        mlp_ratio: hidden width of the MLPs over embed_dim; default: the architecture's
        pos_embed: sincos2d: fixed table of MAE; learned: trained, random at first; learned2d: likewise, a row and a
            column part; none: zeros
        class_token: put a class token in front
        global_pool: feature of the image: token: the class token; avg: mean of the patches, both after the final norm
        fc_norm: with global_pool=avg: the final norm comes after the mean, as MAE fine-tunes; tokens stay without norm
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block
        grad_checkpointing: compute the blocks' activations again in the backward pass; slower, much less memory

    Raises:
        ValueError: an unknown name or an impossible value.
    """

    def __init__(
        self,
        name: str,
        img_size: int | tuple[int, int] = 224,
        feature_patch_size: int | None = None,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        pos_embed: Literal["sincos2d", "learned", "learned2d", "none"] = "learned",
        class_token: bool = True,
        global_pool: Literal["token", "avg"] = "token",
        fc_norm: bool = False,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            name, img_size, feature_patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, pos_embed,
            class_token, global_pool, fc_norm, drop_path_rate, grad_checkpointing,
        )  # fmt: skip

    @staticmethod
    def _timm_name(name: str) -> str:
        return timm_name(name, hybrid_names(), ", ".join(hybrid_names()))

    def config(self) -> dict[str, Any]:
        """Constructor arguments that build this encoder again; plain types."""
        return {"feature_patch_size" if key == "patch_size" else key: value for key, value in super().config().items()}

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tokens:
        """Encode an image; masked patches are hidden from the stem and replaced by the mask token behind it.

        Args:
            image: (B, C, H, W), normalised.
            mask: bool (B, N), True = masked.
            mask_token: (1, 1, D), needed with ``mask``.
        """
        self.check_image(image)
        return super().forward(image if mask is None else self._hidden(image, mask), mask, mask_token)

    def forward_visible(self, image: Tensor, keep: Tensor) -> Tokens:
        """Encode some patches of an image, the others being hidden from the stem.

        Args:
            image: (B, C, H, W), normalised.
            keep: int64 (B, L), indices of the visible patches; the tokens come in this order.
        """
        self.check_image(image)
        keep = keep.expand(len(image), -1)
        count = self.grid_size[0] * self.grid_size[1]
        hidden = torch.ones(len(image), count, dtype=torch.bool, device=image.device).scatter(1, keep, False)
        rows = torch.arange(len(image), device=image.device)[:, None]
        patches = self.model.patch_embed(self._hidden(image, hidden))[rows, keep]  # (B, L, D)
        return self._encode(patches + self.positions()[0, self.num_positions_before_patches :][keep])

    def _hidden(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image with the pixels of masked patches, ``mask`` bool (B, N), at 0."""
        size = self.patch_size
        grid = mask.view(len(mask), 1, image.shape[2] // size, image.shape[3] // size)
        return image.masked_fill(grid.repeat_interleave(size, 2).repeat_interleave(size, 3), 0.0)
