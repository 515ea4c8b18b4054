"""Pixels for networks that normalise them for themselves: tokenizers and the teachers of tokenizers."""

from __future__ import annotations

import torch
from torch import Tensor


def pixels_of(image: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Pixels in [0, 1], at least in float32, (B, C, H, W).

    Args:
        image: (B, C, H, W), uint8, or floating point in [0, 1].
        shape: (C, H, W) that it should have.

    Raises:
        ValueError: another shape, or values out of range on a CPU (looking would make a GPU wait).
    """
    if tuple(image.shape[1:]) != shape:
        raise ValueError(
            f"target_image of shape {tuple(image.shape)}: this tokenizer takes (B, {shape[0]}, {shape[1]}, {shape[2]})"
        )
    if image.dtype == torch.uint8:
        return image.float() / 255
    if image.device.type == "cpu" and image.numel() and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"target_image has values from {float(image.min()):.3g} to {float(image.max()):.3g}: allowed: uint8, or "
            "floating point in [0, 1]; a tokenizer maps pixels itself, so they should not be normalised"
        )
    return image.to(torch.promote_types(image.dtype, torch.float32))
