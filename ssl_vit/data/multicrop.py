"""The views of self-distillation: large and small crops of an image, each with its own change of colours."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from PIL import ImageFilter, ImageOps
from torch import Tensor

from ssl_vit.data.masking import block_mask
from ssl_vit.data.views import CropView, from_pil, to_pil


@dataclass(frozen=True)
class ColourView(CropView):
    """Crop, flip, colour jitter, grey, blur, solarisation, in this order (BYOL, DINO, iBOT); uint8 in and out.

    Colours are changed by Pillow, as in the published code, so only images of 1 or 3 channels can have any.

    Args:
        jitter: brightness, contrast, saturation and hue of the colour jitter.
        jitter_prob: probability of the colour jitter.
        grey: probability of a grey image.
        blur: probability of a Gaussian blur.
        blur_sigma: smallest and largest standard deviation of the blur in pixels.
        solarise: probability that pixels from 128 on are inverted.
    """

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_prob: float = 0.8
    grey: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("jitter_prob", "grey", "blur", "solarise"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)}: allowed: a probability, 0 to 1")
        if not (min(self.jitter) >= 0 and self.jitter[3] <= 0.5):
            raise ValueError(
                f"jitter={list(self.jitter)}: allowed: numbers from 0, hue to 0.5; e.g. [0.4, 0.4, 0.2, 0.1]"
            )
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma={list(self.blur_sigma)}: allowed: 0 < smallest <= largest, e.g. [0.1, 2.0]")

    @property
    def changes_colours(self) -> bool:
        """Whether anything beside crop and flip can happen."""
        return max(self.jitter_prob, self.grey, self.blur, self.solarise) > 0

    def view(self, image: Tensor) -> Tensor:
        """uint8 (C, H, W) to uint8 (C, *img_size)."""
        cropped = self.crop(image)
        return self.recolour(cropped) if self.changes_colours else cropped

    def recolour(self, image: Tensor) -> Tensor:
        """Jitter, grey, blur and solarisation of a uint8 (C, H, W) image."""
        from torchvision.transforms import ColorJitter

        picture = to_pil(image)
        if random.random() < self.jitter_prob:
            picture = ColorJitter(*self.jitter)(picture)
        if random.random() < self.grey:
            picture = picture.convert("L").convert(picture.mode)
        if random.random() < self.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(*self.blur_sigma)))
        if random.random() < self.solarise:
            picture = ImageOps.solarize(picture)
        return from_pil(picture)


@dataclass(frozen=True)
class MaskRule:
    """How many patches of a view are masked, and in which shape (iBOT, arXiv 2111.07832, section 3.2).

    Args:
        grid_size: (h, w) of the patch grid.
        ratios: shares of the patches, one of which is drawn for each view; 0 masks nothing.
        variances: for each share, how far it is uniformly varied either way.
        shape: ``"block"`` or ``"random"``.
    """

    grid_size: tuple[int, int]
    ratios: tuple[float, ...]
    variances: tuple[float, ...]
    shape: str

    def __post_init__(self) -> None:
        if len(self.ratios) != len(self.variances) or not self.ratios:
            raise ValueError(
                f"mask_variance={list(self.variances)}: should have one number for each of "
                f"mask_ratio={list(self.ratios)}"
            )
        fits = all(0 <= v <= r and r + v < 1 for r, v in zip(self.ratios, self.variances, strict=True))
        if not fits or self.most == 0:
            raise ValueError(
                f"mask_ratio={list(self.ratios)}, mask_variance={list(self.variances)}: allowed: 0 <= variance <= "
                f"ratio, their sum below 1 and for one of them at least a patch of {self.num_patches}; "
                "e.g. [0.0, 0.3] and [0.0, 0.2]"
            )

    @property
    def num_patches(self) -> int:
        """Patches of a view."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def most(self) -> int:
        """Largest number of patches that can be masked."""
        largest = max(r + v for r, v in zip(self.ratios, self.variances, strict=True))
        return int(largest * self.num_patches + 1e-6)

    def draw(self) -> Tensor:
        """bool (N,), True = masked."""
        which = random.randrange(len(self.ratios))
        ratio = random.uniform(self.ratios[which] - self.variances[which], self.ratios[which] + self.variances[which])
        if self.shape == "block":
            return block_mask(self.grid_size, ratio * self.num_patches, (min(self.grid_size) // 3) ** 2, exact=False)
        masked = int(ratio * self.num_patches)
        return torch.randperm(self.num_patches) < masked


@dataclass(frozen=True)
class MultiCropView:
    """Two large views with masks, and small ones (SwAV's multi-crop as DINO and iBOT use it).

    Args:
        first: the first large view.
        second: the second large view.
        small: the small views.
        num_small: their number.
        mask: of the large views.
    """

    first: ColourView
    second: ColourView
    small: ColourView
    num_small: int
    mask: MaskRule

    def __post_init__(self) -> None:
        if self.num_small < 0:
            raise ValueError(f"local_crops={self.num_small}: allowed: whole numbers from 0; nearest: 0")

    def check(self, in_chans: int, patch_size: int) -> None:
        """What the views need of an encoder.

        Raises:
            ValueError: channels that have no colours, or small views that are not whole patches.
        """
        if in_chans not in (1, 3) and any(v.changes_colours for v in (self.first, self.second, self.small)):
            raise ValueError(
                f"encoder.in_chans={in_chans}: colours of 1 or 3 channels can be changed; allowed with others: 0 for "
                "jitter_prob, grey, solarise and each of blur"
            )
        side = self.small.img_size[0]
        if self.num_small and (side < patch_size or side % patch_size):
            near = max(round(side / patch_size), 1) * patch_size
            raise ValueError(f"local_size={side}: should be a multiple of patch_size={patch_size}; nearest: {near}")

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """``global_views`` uint8 (2, C, H, W), ``mask`` bool (2, N), ``local_views`` uint8 (n, C, h, w) if n > 0."""
        image: Tensor = sample["image"]
        views = {
            "global_views": torch.stack([self.first.view(image), self.second.view(image)]),
            "mask": torch.stack([self.mask.draw(), self.mask.draw()]),
        }
        if self.num_small:
            views["local_views"] = torch.stack([self.small.view(image) for _ in range(self.num_small)])
        return views
