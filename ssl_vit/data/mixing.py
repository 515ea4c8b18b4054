"""How well the classes of stored samples are mixed: shards made by others are often sorted."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

WINDOW = 4096
"""Stored neighbours that training mixes with each other: the default of ``data.window``."""
ENOUGH = 0.8
"""Share of the classes of a shuffled order; chance alone stays far above it, a sorted set of many classes below."""


class Mixing(NamedTuple):
    """Distinct classes among ``window`` stored neighbours: the mean found, and that expected of a shuffled order."""

    window: int
    found: float
    expected: float


def mixing(labels: np.ndarray, window: int = WINDOW) -> Mixing:
    """Measure how labels ``(N,)`` are mixed, in windows of at most a sixteenth of them."""
    from scipy.special import gammaln

    window = max(1, min(window, len(labels) // 16))
    blocks = np.sort(labels[: len(labels) // window * window].reshape(-1, window), axis=1)
    found = 1 + (np.diff(blocks, axis=1) != 0).sum(axis=1).mean()
    _, counts = np.unique(labels, return_counts=True)
    # The chance that a window, drawn without putting back, has none of a class: C(others, window) / C(all, window).
    size, others = len(labels), len(labels) - counts
    ways, all_ways = (gammaln(n + 1) - gammaln(n - window + 1) for n in (others, size))
    expected = (1 - np.exp(ways - all_ways)).sum()
    return Mixing(window, float(found), float(expected))


def advice(labels: np.ndarray, source: str | Path) -> str:
    """What the mixing of labelled shards, a folder or a URL, means for training, in one line."""
    window, found, expected = mixing(labels)
    fact = f"{window} stored neighbours hold {found:.1f} classes on average, {expected:.1f} if they were shuffled"
    if found >= ENOUGH * expected:
        return f"  mixed    {fact}"
    return (
        f"  sorted   {fact} ({found / expected:.0%}, enough: {ENOUGH:.0%}): training mixes stored neighbours only "
        f"locally, so its batches would hold few classes; write them in random order:\n"
        f"           python pipelines/pack.py shards:{source} OUT"
    )
