"""Masks over the patch grid, drawn per view; a mask is a bool tensor in which True means masked."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """Number of patches that random masking keeps: ``int(N * (1 - mask_ratio))`` (MAE's rule).

    Raises:
        ValueError: nothing would be visible, or nothing masked.
    """
    keep = int(num_patches * (1 - mask_ratio))
    if not 0 < keep < num_patches:
        raise ValueError(
            f"mask_ratio={mask_ratio}: {keep} of {num_patches} patches would be visible; allowed: a ratio between 0 "
            f"and 1 that leaves at least one patch visible and one masked, e.g. 0.75"
        )
    return keep


def random_mask(grid_size: tuple[int, int], mask_ratio: float) -> Tensor:
    """Uniformly random mask of an exact count (MAE, arXiv 2111.06377, section 3).

    Draws from torch's default generator, which the loader seeds for each view.

    Returns:
        bool (N,), with ``N - visible_count(N, mask_ratio)`` True entries.
    """
    num_patches = grid_size[0] * grid_size[1]
    keep = visible_count(num_patches, mask_ratio)
    mask = torch.ones(num_patches, dtype=torch.bool)
    mask[torch.rand(num_patches).argsort()[:keep]] = False
    return mask
