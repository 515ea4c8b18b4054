"""Codes as pictures: each code shown as the mean of the patches that have it, which any tokenizer allows."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_vit.data.loader import EvalBatches
from ssl_vit.data.order import derive_seed
from ssl_vit.data.views import CentreView, seed_generators
from ssl_vit.evaluation.base import Evaluation, Subject, Subset
from ssl_vit.evaluation.codebook import coded
from ssl_vit.evaluation.features import loaded
from ssl_vit.evaluation.pictures import PICTURE_SEED, fixed_images, in_eval_mode, sheet, shown
from ssl_vit.modules.patches import patchify, unpatchify


class Decoded(Evaluation):
    """One row an image: original, masked, its codes decoded, and the codes that beit predicts in the masked places.

    A tokenizer that was trained towards features has no decoder to pixels. The mean patch of a code shows what the code
    stands for, whatever the tokenizer; codes that no patch has are grey.

    Args:
        count: images in the sheet, the same ones with the same masks at every step
        images: images whose patches give the means, at even distances
    """

    labelled = False
    call = "predict"

    def __init__(self, count: int = 8, images: int = 2048) -> None:
        for name, value in (("count", count), ("images", images)):
            if value < 1:
                raise ValueError(f"{name}={value}: should be at least 1")
        self.count, self.images = count, images

    @torch.no_grad()
    def __call__(self, subject: Subject) -> dict[str, float]:
        """Saves ``pictures/decoded_XXXXXXXX.png``; ``error``: of the decoded codes, over the variance of the pixels."""
        seed_generators(derive_seed(subject.seed, PICTURE_SEED))
        with in_eval_mode(subject.objective):
            means, error = self._means(subject)
            batch = fixed_images(subject, self.count)
            if not batch:
                return {}
            found = coded(subject, batch, "decoded")
        image, codes = batch["image"], found["codes"]
        side, grid = _grid(image, codes)
        columns = {"original": image, "decoded": unpatchify(means[codes], side, grid)}
        if "mask" in found:
            mask = found["mask"][..., None]
            patches = patchify(image, side)
            columns["masked"] = unpatchify(patches.masked_fill(mask, 0.0), side, grid)
            columns["predicted"] = unpatchify(torch.where(mask, means[found["predicted"]], patches), side, grid)
        order = [name for name in ("original", "masked", "decoded", "predicted") if name in columns]
        subject.picture("decoded", sheet([shown(columns[name], subject.pixels) for name in order]))
        return {"error": error}

    def _means(self, subject: Subject) -> tuple[Tensor, float]:
        """The mean patch of each code, (K, p p C), and how far patches are from the mean of theirs."""
        places = Subset.spread(subject.images.index, self.images).samples
        view = CentreView(subject.img_size, subject.pixels.crop_pct, subject.pixels.interpolation)
        batches = EvalBatches(subject.images.index, places, view, subject.pixels, subject.batch_size)
        parts: list[tuple[Tensor, Tensor]] = []
        size = 0
        for batch, _ in loaded(subject, batches, len(batches)):
            if batch:
                moved = subject.pixels.to_device(batch, subject.device)
                found = coded(subject, moved, "decoded")
                size = int(found["vocab_size"])
                side, _ = _grid(moved["image"], found["codes"])
                parts.append((found["codes"].flatten(), patchify(moved["image"], side).flatten(0, 1)))
        codes, patches = (torch.cat(column) for column in zip(*parts, strict=True))
        sums = patches.new_zeros(size, patches.shape[1]).index_add(0, codes, patches)
        counts = torch.bincount(codes, minlength=size).clamp_min(1)[:, None]
        means = sums / counts
        error = (patches - means[codes]).square().sum() / (patches - patches.mean(dim=0)).square().sum().clamp_min(
            1e-12
        )
        return means, error.item()


def _grid(image: Tensor, codes: Tensor) -> tuple[int, tuple[int, int]]:
    """Side of the square patches of pictures (B, C, H, W) that have codes (B, N), and their grid."""
    height, width = image.shape[-2:]
    side = round((height * width / codes.shape[1]) ** 0.5)
    return side, (height // side, width // side)
