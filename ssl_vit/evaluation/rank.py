"""Label-free measures of features: effective rank, decay of the spectrum, spread; a collapse shows without labels."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ssl_vit.evaluation.base import Evaluation, Subject

logger = logging.getLogger(__name__)

FIRST, LAST = 5, 50
"""Ranks, from 0, over which the spectrum's decay is fitted; the last one is left out."""


class Rank(Evaluation):
    """Effective rank (RankMe, arXiv 2210.02885) and spectral decay (alpha-ReQ, arXiv 2202.05808) of features.

    Without labels these tell whether training goes well: the effective rank should not fall, alpha near 1 is better
    than far from it, and features of one image that are those of all are a collapse, which is warned of.
    """

    labelled = False

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``effective_rank``, at most D; ``alpha`` where there are dimensions enough; ``feature_std``.

        The effective rank is the exponential of the entropy of the features' singular values, ``feature_std`` the mean
        standard deviation of a feature.
        """
        features, _ = subject.features("images")
        singular = torch.linalg.svdvals(features.double())
        share = singular / singular.sum().clamp_min(1e-12) + 1e-7
        entropy = -(share * share.log()).sum()
        centred = features.double() - features.double().mean(dim=0)
        spread = (centred.square().sum() / features.double().square().sum().clamp_min(1e-24)).sqrt().item()
        if len(features) > 1 and spread < 1e-3:
            logger.warning(
                "rank: collapse suspected: features of different images differ by %.1e of their length; look at the "
                "loss's own numbers, lower optim.base_lr, or start from another seed",
                spread,
            )
        numbers = {"effective_rank": entropy.exp().item(), "feature_std": features.std(dim=0).mean().item()}
        alpha = spectral_decay(torch.linalg.svdvals(centred).square())
        return numbers if alpha is None else {**numbers, "alpha": alpha}


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
