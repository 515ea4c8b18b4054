"""Label-free measures of features: effective rank and spread. A collapsed encoder shows here without any label."""

from __future__ import annotations

import torch

from ssl_vit.evaluation.base import Evaluation, Subject


class Rank(Evaluation):
    """Effective rank: the exponential of the entropy of the features' singular values (RankMe, arXiv 2210.02885)."""

    labelled = False

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``effective_rank``, at most D, and ``feature_std``, the mean standard deviation of a feature."""
        features, _ = subject.features("images")
        singular = torch.linalg.svdvals(features.double())
        share = singular / singular.sum().clamp_min(1e-12) + 1e-7
        entropy = -(share * share.log()).sum()
        return {"effective_rank": entropy.exp().item(), "feature_std": features.std(dim=0).mean().item()}
