"""Position tables: MAE's fixed 2-D sine-cosine table, learned rows and columns, and resizing within training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sincos2d_table(
    grid_size: tuple[int, int], embed_dim: int, num_prefix_tokens: int = 0, name: str = "embed_dim"
) -> Tensor:
    """Position table of MAE (arXiv 2111.06377, section A.1): first half of the channels for x, second half for y.

    Each half is the sines of ``embed_dim / 4`` frequencies (float64, base 10000), then their cosines. Prefix tokens
    have the position zero.

    Args:
        grid_size: (h, w) of the patch grid.
        embed_dim: channels of the table.
        num_prefix_tokens: rows of zeros in front.
        name: what messages call ``embed_dim``.

    Returns:
        (1, P + N, D), float32; patches row by row.

    Raises:
        ValueError: ``embed_dim`` is not divisible by 4.
    """
    if embed_dim < 1 or embed_dim % 4:
        near = max(round(embed_dim / 4), 1) * 4
        raise ValueError(f"{name}={embed_dim}: allowed with fixed positions: multiples of 4; nearest: {near}")
    height, width = grid_size
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    x = torch.arange(width, dtype=torch.float64).repeat(height).outer(frequencies)  # (N, D/4)
    y = torch.arange(height, dtype=torch.float64).repeat_interleave(width).outer(frequencies)  # (N, D/4)
    patches = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)  # (N, D)
    prefix = torch.zeros(num_prefix_tokens, embed_dim, dtype=torch.float64)
    return torch.cat([prefix, patches])[None].float()


def row_column_table(table: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """The nearest table in which a patch's first channels depend on its column and its last ones on its row.

    This is the learned 2-D embedding that ViT compares (arXiv 2010.11929, section D.4: an X and a Y embedding of half
    the width each, concatenated), kept as a table of the usual layout. What is equal gets equal gradients, so it stays
    equal under any optimizer that treats numbers alone.

    Args:
        table: (1, P + N, D); the P positions of prefix tokens stay as they are.
        grid_size: (h, w), of N patches.

    Returns:
        (1, P + N, D).
    """
    count = grid_size[0] * grid_size[1]
    prefix, patches = table.split([table.shape[1] - count, count], dim=1)
    x, y = patches.unflatten(1, grid_size).chunk(2, dim=-1)  # (1, h, w, D / 2) each
    x, y = x.mean(dim=1, keepdim=True).expand_as(x), y.mean(dim=2, keepdim=True).expand_as(y)
    return torch.cat([prefix, torch.cat([x, y], dim=-1).flatten(1, 2)], dim=1)


def resized_positions(table: Tensor, grid_size: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A trained table at another grid, as DINO and iBOT resize it for small crops; gradients flow back.

    Bicubic without antialiasing. The published code adds 0.1 patches to the new grid against rounding, which moves the
    sampled places by as much; it is kept. Written as a product, because the backward pass of the interpolation itself
    is not deterministic on a GPU.

    Args:
        table: (1, N, D) positions of patches, row by row.
        grid_size: its (h, w).
        new_grid: the wanted (h', w').

    Returns:
        (1, N', D), at least float32.
    """
    units = torch.eye(table.shape[1], device=table.device, dtype=table.dtype).unflatten(1, grid_size)[None]
    scale = [(new + 0.1) / old for new, old in zip(new_grid, grid_size, strict=True)]
    weights = F.interpolate(units, scale_factor=scale, mode="bicubic", align_corners=False)  # (1, N, h', w')
    with torch.autocast(table.device.type, enabled=False):
        return weights.flatten(2).transpose(1, 2) @ table
