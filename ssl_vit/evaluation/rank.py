"""Label-free measures of features: effective rank, decay of the spectrum, spread; a collapse shows without labels."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ssl_vit.evaluation.base import Evaluation, Subject

logger = logging.getLogger(__name__)

FIRST, LAST = 5, 50
"""Ranks, from 0, over which the spectrum's decay is fitted; the last one is left out."""

SPREAD = 1e-3
"""Share of their length in which features of different images should differ at least."""
RANK, SHARE = 2.0, 0.01
"""Effective rank around the mean that features should have at least: two, or that share of what it can be.

Features along a line have 1. Untrained encoders, whose features tell little but colour, were measured to have 5 to 30
of 48 to 512 (on handwritten digits a ResNet 2 % of what it can be, ViTs 10 % or more), trained ones a fifth or more.
"""


class Rank(Evaluation):
    """Effective rank (RankMe, arXiv 2210.02885) and spectral decay (alpha-ReQ, arXiv 2202.05808) of features.

    Without labels these tell whether training goes well: the effective rank should not fall, alpha near 1 is better
    than far from it; features of all images alike, or along a line, are a collapse, which is warned of.
    """

    labelled = False

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``effective_rank``, at most D; ``alpha`` where there are dimensions enough; ``feature_std``.

        The effective rank is the exponential of the entropy of the features' singular values, ``feature_std`` the mean
        standard deviation of a feature.
        """
        features, _ = subject.features("images")
        centred = features.double() - features.double().mean(dim=0)
        spread = (centred.square().sum() / features.double().square().sum().clamp_min(1e-24)).sqrt().item()
        singular = torch.linalg.svdvals(centred)
        self._warn_of_collapse(spread, effective_rank(singular), min(len(features) - 1, features.shape[1]))
        rank = effective_rank(torch.linalg.svdvals(features.double()))
        numbers = {"effective_rank": rank, "feature_std": features.std(dim=0).mean().item()}
        alpha = spectral_decay(singular.square())
        return numbers if alpha is None else {**numbers, "alpha": alpha}

    def _warn_of_collapse(self, spread: float, rank: float, most: int) -> None:
        """Warn of features that hardly differ or differ in few directions of ``most``.

        The rank is that around the mean: a mean that is long against the spread hides whether there is one direction.
        """
        if most and spread < SPREAD:
            found = f"differ by {spread:.1e} of their length"
        elif most > 2 * RANK and rank < max(RANK, SHARE * most):
            found = f"differ in {rank:.1f} of {most} directions (effective rank around their mean)"
        else:
            return
        logger.warning(
            "rank: collapse suspected: features of different images %s; look at the loss's own numbers, lower "
            "optim.base_lr, or start from another seed",
            found,
        )


def effective_rank(singular: Tensor) -> float:
    """The exponential of the entropy of singular values."""
    share = singular / singular.sum().clamp_min(1e-12) + 1e-7
    return (-(share * share.log()).sum()).exp().item()


def spectral_decay(eigenvalues: Tensor) -> float | None:
    """alpha of ``eigenvalue = c * rank ** -alpha``, fitted over ranks 5 to 49 in logarithms with weights 1 / rank.

    That is the fit of the published code. None: fewer than ten eigenvalues above 0 are in that range.
    """
    values = eigenvalues[FIRST:LAST]
    ranks = torch.arange(FIRST, FIRST + len(values), dtype=torch.float64, device=eigenvalues.device)
    usable = values > eigenvalues[0] * 1e-12
    if int(usable.sum()) < 10:
        return None
    y, ranks = values[usable].log(), ranks[usable]
    x = torch.stack([-(ranks + 1).log(), torch.ones_like(ranks)], dim=1)
    weighted = x.T / (ranks + 1)
    return torch.linalg.solve(weighted @ x, weighted @ y)[0].item()
