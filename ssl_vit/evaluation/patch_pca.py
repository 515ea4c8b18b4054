"""Patch features as colours: their first three principal components over some images (DINOv2, arXiv 2304.07193)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_vit.evaluation.base import Evaluation, Subject
from ssl_vit.evaluation.pictures import fixed_images, in_eval_mode, patch_grid, sheet, shown, to_rgb


class PatchPCA(Evaluation):
    """A row an image: the image, and its patches in the colours of the components that all shown images share.

    Args:
        count: images, the same ones at every step.
    """

    labelled = False

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise ValueError(f"count={count}: should be at least 1")
        self.count = count

    @torch.no_grad()
    def __call__(self, subject: Subject) -> dict[str, float]:
        """Saves ``pictures/patch_pca_XXXXXXXX.png``; ``explained``: the components' share of the variance."""
        batch = fixed_images(subject, self.count)
        if not batch:
            return {}
        with in_eval_mode(subject.objective):
            patches = subject.objective(batch, call="encode").patches.cpu()  # (B, N, D)
        colours, explained = component_colours(patches)
        picture = shown(batch["image"], subject.pixels)
        enlarged = torch.nn.functional.interpolate(patch_grid(colours, picture), picture.shape[-2:], mode="nearest")
        subject.picture("patch_pca", sheet([picture, to_rgb(enlarged)]))
        return {"explained": explained}


def component_colours(patches: Tensor) -> tuple[Tensor, float]:
    """Patch features (B, N, D) as colours (B, N, 3) in [0, 1], and the share of the variance that they show.

    Each component is stretched from its 1st to its 99th percentile; its sign makes the larger side bright, so that
    pictures of one encoder agree.
    """
    flat = patches.double().flatten(0, 1)
    flat = flat - flat.mean(dim=0)
    _, singular, axes = torch.linalg.svd(flat, full_matrices=False)
    count = min(3, len(singular))
    found = flat @ axes[:count].T  # (B N, 3)
    found = found * torch.where((found**3).sum(dim=0) < 0, -1.0, 1.0)
    low, high = (torch.quantile(found, q, dim=0) for q in (0.01, 0.99))
    colours = ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colours = torch.nn.functional.pad(colours, (0, 3 - count))
    variance = singular.square()
    share = float(variance[:count].sum() / variance.sum().clamp_min(1e-24))
    return colours.view(*patches.shape[:2], 3).float(), share
