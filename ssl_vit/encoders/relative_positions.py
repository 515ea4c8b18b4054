"""Tables of relative positions, one row for each relation of two tokens, and how BEiT resizes them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssl_vit.config import InputError

PREFIX_RELATIONS = 3
"""Rows at the end of a table: class token to patch, patch to class token, class token to itself."""


def grid_of_table(table: Tensor, stored: tuple[int, int] | None, own: tuple[int, int], where: str) -> tuple[int, int]:
    """The patch grid for which a table (relations, heads) was made: as stated, this one, or a square."""
    relations = table.shape[0] - PREFIX_RELATIONS
    side = (round(max(relations, 1) ** 0.5) + 1) // 2
    for grid in (stored, own, (side, side)):
        if grid is not None and (2 * grid[0] - 1) * (2 * grid[1] - 1) == relations:
            return grid
    raise InputError(f"{where} has {table.shape[0]} relations, not of a square grid, and nothing tells which")


def resized_table(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A table of relative positions for another patch grid, as BEiT's fine-tuning resizes it.

    The old relations are laid at distances that grow geometrically, so that near patches stay as they were and the
    farthest reach the new edge; a cubic spline through them is read at the new whole distances.

    Args:
        table: (relations, heads), those with the class token last.
        source: (h, w) of its grid.
        target: (h, w) of the new grid.
    """
    from scipy.interpolate import RectBivariateSpline

    sides = [2 * s - 1 for s in source]
    old = [_stretched(s // 2, 2 * t - 1) for s, t in zip(sides, target, strict=True)]
    new = [np.arange(-(t - 1.0), t) for t in target]
    values = table[:-PREFIX_RELATIONS].double().numpy().reshape(*sides, -1)
    ky, kx = (min(3, side - 1) for side in sides)
    (y, x), (new_y, new_x) = old, new
    heads = [
        RectBivariateSpline(y, x, values[..., h], kx=ky, ky=kx)(new_y, new_x, grid=True).ravel()
        for h in range(values.shape[-1])
    ]
    patches = torch.from_numpy(np.stack(heads, axis=1)).to(table.dtype)
    return torch.cat([patches, table[-PREFIX_RELATIONS:]])


def _stretched(count: int, target_side: int) -> np.ndarray:
    """Places of ``2 * count + 1`` old distances: 1, 1 + q, 1 + q + q^2 ... such that the last reaches the new edge."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reached = (1 - ratio**count) / (1 - ratio)
        low, high = (low, ratio) if reached > target_side // 2 else (ratio, high)
    places = np.cumsum(((low + high) / 2) ** np.arange(count))
    return np.concatenate([-places[::-1], [0.0], places])
