"""Numbers of each channel, and the normalisation that they make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def of_channels(values: Sequence[float], like: Tensor) -> Tensor:
    """(C, 1, 1) of a tensor's type, filled where it is: a GPU that is sent numbers must first do all it was asked."""
    return torch.stack([like.new_full((1, 1), value) for value in values])


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels in [0, 1], (..., C, H, W), minus ``mean`` over ``std`` of each channel."""
    return (pixels - of_channels(mean, pixels)) / of_channels(std, pixels)
