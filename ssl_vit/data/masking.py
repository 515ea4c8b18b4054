"""Masks over the patch grid, drawn per view; a mask is a bool tensor in which True means masked."""

from __future__ import annotations

import math
import random

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


def unit_mask(img_size: tuple[int, int], unit: int, stride: int, mask_ratio: float) -> Tensor:
    """Random mask of large square units, given at a finer grid (SimMIM, arXiv 2111.09886, section 3.2).

    ``ceil(N * mask_ratio)`` of the N units are masked.

    Args:
        img_size: (H, W) in pixels, multiples of ``unit``.
        unit: side of a unit in pixels.
        stride: side of the patches that the mask is given for; divides ``unit``.
        mask_ratio: share of the units that are masked.

    Returns:
        bool (H / stride * W / stride,), row by row.
    """
    height, width = img_size[0] // unit, img_size[1] // unit
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[torch.rand(height * width).argsort()[: masked_units(height * width, mask_ratio)]] = True
    times = unit // stride
    return mask.view(height, width).repeat_interleave(times, 0).repeat_interleave(times, 1).flatten()


def masked_units(num_units: int, mask_ratio: float) -> int:
    """``ceil(N * mask_ratio)``, SimMIM's rule.

    Raises:
        ValueError: nothing would be masked, or everything.
    """
    count = math.ceil(num_units * mask_ratio)
    if not 0 < count < num_units:
        raise ValueError(
            f"mask_ratio={mask_ratio}: {count} of {num_units} units would be masked; allowed: a ratio that leaves at "
            "least one unit visible and one masked, e.g. 0.6 of 4 or more units (a smaller mask_unit makes more)"
        )
    return count


def block_mask(
    grid_size: tuple[int, int],
    num_masked: float,
    min_block: int,
    max_block: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    exact: bool = True,
) -> Tensor:
    """Rectangles of patches until ``num_masked`` are masked (BEiT, arXiv 2106.08254, algorithm 1, as released).

    The area of a block is uniform between ``min_block`` and what is left to mask (which may be less than
    ``min_block``), the logarithm of its aspect ratio uniform; it is smaller than the grid in both directions, takes at
    least one new patch and never more than are left. After ten tries that do not fit, BEiT stops short; BEiT v2 fills
    up with single patches. iBOT's masks (arXiv 2111.07832) are BEiT's with ``(min(h, w) // 3) ** 2`` patches as the
    smallest block. Draws from ``random``, which the loader seeds for each view.

    Args:
        grid_size: (h, w) of the patch grid.
        num_masked: patches to mask; with ``exact`` a whole number.
        min_block: smallest area of a block.
        max_block: largest area of a block; None: what is left.
        aspect: smallest and largest height over width of a block.
        exact: fill up with single patches to exactly ``num_masked`` (BEiT v2).

    Returns:
        bool (N,), with ``num_masked`` True entries, or at most so many without ``exact``.
    """
    rows, columns = grid_size
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    left, tries = num_masked, 10
    low, high = math.log(aspect[0]), math.log(aspect[1])
    while left > 0 and tries > 0:
        tries -= 1
        largest = left if max_block is None else min(left, max_block)
        area, shape = random.uniform(min_block, largest), math.exp(random.uniform(low, high))
        height, width = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if height >= rows or width >= columns:
            continue
        top, start = random.randint(0, rows - height), random.randint(0, columns - width)
        block = mask[top : top + height, start : start + width]
        new = height * width - int(block.sum())
        if 0 < new <= largest:
            block.fill_(True)
            left, tries = left - new, 10
    mask = mask.flatten()
    if exact and left > 0:
        free = (~mask).nonzero().flatten().tolist()
        mask[random.sample(free, int(left))] = True
    return mask
