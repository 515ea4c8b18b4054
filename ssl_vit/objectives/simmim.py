"""SimMIM (arXiv 2111.09886): a mask token in place of large masked units, raw pixels regressed by one linear layer."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ssl_vit.data.masking import masked_units, unit_mask
from ssl_vit.data.views import UnitMaskedView
from ssl_vit.encoders.base import Encoder
from ssl_vit.objectives.base import Objective


class SimMIM(Objective):
    """Simple masked image modelling (section 3); the encoder sees the whole sequence and keeps timm's initialisation.

    Args:
        encoder: a ViT or a Swin
        mask_unit: side of a masked unit in pixels, whatever the encoder's patches
        mask_ratio: share of the units that are masked
        crop_scale: smallest and largest share of the image's area that a crop covers
        crop_ratio: smallest and largest aspect ratio of a crop
        flip: probability of a horizontal flip
        interpolation: filter that resizes a crop

    Raises:
        ValueError: an encoder that cannot replace patches by a token, or an impossible value.
    """

    def __init__(
        self,
        encoder: Encoder,
        mask_unit: int = 32,
        mask_ratio: float = 0.6,
        crop_scale: tuple[float, float] = (0.67, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: Literal["bicubic", "bilinear"] = "bilinear",
    ) -> None:
        super().__init__(encoder)
        if not hasattr(encoder, "mask_stride"):
            raise ValueError(f"encoder.name={encoder.name!r}: has no place for a mask token; allowed: vit_*, swin_*")
        stride, (height, width) = encoder.mask_stride, encoder.img_size
        if mask_unit < 1 or mask_unit % stride or height % mask_unit or width % mask_unit:
            fitting = [u for u in range(stride, min(height, width) + 1, stride) if height % u == 0 and width % u == 0]
            near = min(fitting, key=lambda unit: abs(unit - mask_unit))
            raise ValueError(
                f"mask_unit={mask_unit}: should be a multiple of {stride}, the encoder's patches, and divide "
                f"img_size={[height, width]}; nearest: {near}"
            )
        self.mask_unit, self.mask_ratio = mask_unit, mask_ratio
        self.num_masked = masked_units(height * width // mask_unit**2, mask_ratio) * mask_unit**2  # pixels
        self.view = UnitMaskedView(
            img_size=encoder.img_size,
            unit=mask_unit,
            stride=stride,
            mask_ratio=mask_ratio,
            crop_scale=crop_scale,
            crop_ratio=crop_ratio,
            flip=flip,
            interpolation=interpolation,
        )
        token_width = encoder.model.patch_embed.proj.out_channels
        self.mask_token = nn.Parameter(torch.zeros(1, 1, token_width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(encoder.token_dim, encoder.patch_size**2 * encoder.in_chans)

    def no_weight_decay(self) -> set[str]:
        """The mask token, and what the encoder's supervised recipe exempts."""
        return {"mask_token"} | {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean absolute error over the masked pixels of the normalised image, at least in float32.

        The published code adds 1e-5 to the number of masked pixels, which is never 0 here.

        Args:
            batch: ``image`` (B, C, H, W), normalised; ``mask`` bool (B, M), True = masked.
        """
        image, prediction = batch["image"], self.predict(batch)
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        error = (prediction.to(dtype) - image.to(dtype)).abs() * self._pixel_mask(batch["mask"])
        return error.sum() / (len(image) * self.num_masked * self.encoder.in_chans), {}

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        """Predicted pixels everywhere, (B, C, H, W), in the scale of the normalised image."""
        tokens = self.encoder(batch["image"], batch["mask"], self.mask_token).patches  # (B, N, D)
        (h, w), p = self.encoder.grid_size, self.encoder.patch_size
        return rearrange(self.head(tokens), "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pictures in the scale of the normalised image, each (B, C, H, W).

        ``original``; ``masked``: masked units at 0, the mean colour; ``reconstruction``: predictions in place of the
        masked units; ``raw``: predictions everywhere. A batch without ``mask`` gets random ones.
        """
        image = batch["image"]
        if "mask" not in batch:
            view = self.view
            masks = [unit_mask(view.img_size, view.unit, view.stride, view.mask_ratio) for _ in image]
            batch = {**batch, "mask": torch.stack(masks).to(image.device)}
        pixels, prediction = self._pixel_mask(batch["mask"]), self.predict(batch).to(image.dtype)
        return {
            "original": image,
            "masked": image.masked_fill(pixels, 0.0),
            "reconstruction": torch.where(pixels, prediction, image),
            "raw": prediction,
        }

    def _pixel_mask(self, mask: Tensor) -> Tensor:
        """bool (B, M) over patches to bool (B, 1, H, W) over pixels."""
        stride, (height, width) = self.encoder.mask_stride, self.encoder.img_size
        grid = mask.view(len(mask), 1, height // stride, width // stride)
        return grid.repeat_interleave(stride, 2).repeat_interleave(stride, 3)
