"""MAE (arXiv 2111.06377): encode the visible patches, regress the pixels of the masked ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.data.masking import random_mask, visible_count
from ssl_vit.data.views import MaskedView
from ssl_vit.encoders.architectures import check_sizes
from ssl_vit.encoders.base import Encoder
from ssl_vit.encoders.positions import sincos2d_table
from ssl_vit.encoders.vit import run_blocks, transformer_blocks
from ssl_vit.modules.initialisation import initialise_mae
from ssl_vit.modules.patches import gather_patches, patch_statistics, patchify, split_mask, unpatchify
from ssl_vit.objectives.base import Objective


class MAE(Objective):
    """Masked autoencoder with an asymmetric decoder (sections 3 and A.1).

    The constructor gives encoder and decoder the published initialisation; fill the encoder from a file afterwards.
    The decoder sees visible patches first and masked ones after them, each with the position of its own place: a
    transformer does not mind the order, and the masked tokens are then one slice.

    Args:
        encoder: a plain ViT
        mask_ratio: share of the patches that are masked
        norm_pix_loss: regress pixels normalised by mean and standard deviation of their patch
        decoder_embed_dim: width of the decoder
        decoder_depth: blocks of the decoder
        decoder_num_heads: attention heads of the decoder
        decoder_mlp_ratio: hidden width of the decoder's MLPs over decoder_embed_dim
        crop_scale: smallest and largest share of the image's area that a crop covers
        crop_ratio: smallest and largest aspect ratio of a crop
        flip: probability of a horizontal flip
        interpolation: filter that resizes a crop

    Raises:
        ValueError: an encoder that cannot drop patches, or an impossible value.
    """

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        decoder_mlp_ratio: float = 4.0,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> None:
        super().__init__(encoder)
        if not encoder.drops_patches:
            raise ValueError(f"encoder.name={encoder.name!r}: MAE drops patches; allowed: plain ViTs, vit_*")
        table = sincos2d_table(encoder.grid_size, decoder_embed_dim, encoder.num_prefix_tokens, "decoder_embed_dim")
        sizes = {"embed_dim": decoder_embed_dim, "depth": decoder_depth, "num_heads": decoder_num_heads}
        check_sizes("decoder_", **sizes)
        num_patches = encoder.grid_size[0] * encoder.grid_size[1]
        self.num_visible = visible_count(num_patches, mask_ratio)
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        self.view = MaskedView(
            img_size=encoder.img_size,
            grid_size=encoder.grid_size,
            mask_ratio=mask_ratio,
            crop_scale=crop_scale,
            crop_ratio=crop_ratio,
            flip=flip,
            interpolation=interpolation,
        )
        self.decoder_embed = nn.Linear(encoder.token_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.decoder_blocks = transformer_blocks(**sizes, mlp_ratio=decoder_mlp_ratio)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, encoder.patch_size**2 * encoder.in_chans)
        initialise_mae(self)

    def views(self, img_size: tuple[int, int]) -> MaskedView:
        """Crop, flip and a random mask; nothing else (section A.1)."""
        patch = self.encoder.patch_size
        return replace(self.view, img_size=img_size, grid_size=(img_size[0] // patch, img_size[1] // patch))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error over the masked patches, at least in float32.

        Args:
            batch: ``image`` (B, C, H, W), normalised; ``mask`` bool (B, N), True = masked.
        """
        image = batch["image"]
        keep, masked = split_mask(batch["mask"], self.num_visible)
        target = gather_patches(patchify(image, self.encoder.patch_size), masked)  # (B, M, p p C)
        target = target.to(torch.promote_types(target.dtype, torch.float32))
        if self.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        decoded = self._decode(image, keep, masked)[:, -masked.shape[1] :]  # (B, M, D)
        prediction = self.decoder_pred(self.decoder_norm(decoded))  # (B, M, p p C)
        # not its mean: torch gives that scalar the memory of all errors, which whoever keeps the loss would hold
        return F.mse_loss(prediction.to(target.dtype), target, reduction="sum") / target.numel(), {}

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        """The decoder's output for every patch in its place, (B, N, p*p*C), as the loss compares it."""
        keep, masked = split_mask(batch["mask"], self.num_visible)
        decoded = self._decode(batch["image"], keep, masked)[:, self.encoder.num_prefix_tokens :]
        prediction = self.decoder_pred(self.decoder_norm(decoded))  # (B, N, p p C), visible first
        return gather_patches(prediction, torch.cat([keep, masked], dim=1).argsort(dim=1))

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pictures in the scale of the normalised image, each (B, C, H, W).

        ``original``; ``masked``: masked patches at 0, the mean colour; ``reconstruction``: predictions in place of
        the masked patches; ``raw``: predictions everywhere. Predictions of normalised pixels get the mean and
        standard deviation of the true patch back. A batch without ``mask`` gets random ones.
        """
        image = batch["image"]
        if "mask" not in batch:
            masks = [random_mask(self.encoder.grid_size, self.mask_ratio) for _ in image]
            batch = {**batch, "mask": torch.stack(masks).to(image.device)}
        mask = batch["mask"][..., None]
        patches = patchify(image, self.encoder.patch_size)
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        prediction = self.predict(batch).to(patches.dtype)
        if self.norm_pix_loss:
            mean, std = patch_statistics(patches)
            prediction = prediction * std + mean
        rows = {
            "original": patches,
            "masked": patches.masked_fill(mask, 0.0),
            "reconstruction": torch.where(mask, prediction, patches),
            "raw": prediction,
        }
        size, grid = self.encoder.patch_size, self.encoder.grid_size
        return {name: unpatchify(value, size, grid) for name, value in rows.items()}

    def _decode(self, image: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """Decoder tokens before the last norm: prefix, visible and masked patches, (B, P + L + M, D)."""
        encoded = self.decoder_embed(torch.cat(self.encoder.forward_visible(image, keep), dim=1))  # (B, P + L, D)
        prefix, positions = self.decoder_pos_embed[0].tensor_split([self.encoder.num_prefix_tokens])
        visible = encoded + torch.cat([prefix.expand(len(keep), -1, -1), positions[keep]], dim=1)
        tokens = torch.cat([visible, (self.mask_token + positions[masked]).to(visible.dtype)], dim=1)
        return run_blocks(self.decoder_blocks, tokens, self.encoder.grad_checkpointing)
