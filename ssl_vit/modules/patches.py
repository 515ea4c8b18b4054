"""Images as patches of pixels, and masks as indices."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) to (B, N, p*p*C), patches row by row, channels last within a patch (MAE's order)."""
    return rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """(B, N, p*p*C) to (B, C, H, W): the inverse of :func:`patchify`."""
    h, w = grid_size
    p = patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, (B, N, 1) each: unbiased variance, eps 1e-6 under the root."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def gather_patches(patches: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` int64 (B, L) of ``patches`` (B, N, D): (B, L, D)."""
    return patches.gather(1, indices[..., None].expand(-1, -1, patches.shape[-1]))


def split_mask(mask: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Indices of visible and of masked patches, both ascending.

    The count is known, so nothing waits for the device; on a CPU it is checked.

    Args:
        mask: bool (B, N), True = masked.
        num_visible: visible patches of every row.

    Returns:
        int64 (B, L) and int64 (B, M).

    Raises:
        ValueError: a row of a mask on the CPU has another count.
    """
    if mask.device.type == "cpu" and type(mask) is Tensor:  # fake tensors have no values
        counts = (~mask).sum(dim=1)
        if not (counts == num_visible).all():
            raise ValueError(
                f"mask: {sorted(set(counts.tolist()))} of {mask.shape[1]} patches are visible; "
                f"allowed: {num_visible} in every row"
            )
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)  # (B, N)
    return order[:, :num_visible], order[:, num_visible:]
