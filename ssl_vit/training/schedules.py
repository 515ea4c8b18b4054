"""Schedules as pure functions of the step, so that none of them has a state to save."""

from __future__ import annotations

import math
from collections.abc import Sequence


def warmup_cosine(step: float, total: float, warmup: float, peak: float, end: float = 0.0, start: float = 0.0) -> float:
    """Linear warm-up from ``start`` to ``peak``, then half a cosine down to ``end`` (SGDR, arXiv 1608.03983).

    Args:
        step: steps done before this one; fractions are allowed.
        total: steps of the whole schedule.
        warmup: steps of the warm-up.
        peak: value at the end of the warm-up.
        end: value that is reached at ``total``.
        start: value before the first step.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    share = min((step - warmup) / max(total - warmup, 1), 1.0)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * share))


def warmup_constant(
    step: float, total: float, warmup: float, peak: float, end: float = 0.0, start: float = 0.0
) -> float:
    """Linear warm-up from ``start`` to ``peak``, then ``peak``."""
    return start + (peak - start) * step / warmup if step < warmup else peak


def warmup_multistep(
    step: float, warmup: float, peak: float, milestones: Sequence[float], gamma: float, start: float = 0.0
) -> float:
    """Linear warm-up from ``start`` to ``peak``, then ``peak`` times ``gamma`` for each milestone that is reached.

    Args:
        step: steps done before this one.
        warmup: steps of the warm-up.
        peak: value at the end of the warm-up.
        milestones: steps.
        gamma: factor.
        start: value before the first step.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return peak * gamma ** sum(step >= milestone for milestone in milestones)


SCHEDULES = {"cosine": warmup_cosine, "constant": warmup_constant}
