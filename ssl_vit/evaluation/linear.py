"""Linear probe on frozen features: logistic regression whose penalty is chosen on a part of the training set."""

from __future__ import annotations

from typing import Any

import torch

from ssl_vit.evaluation.base import Evaluation, Subject, Subset, standard_error
from ssl_vit.evaluation.logistic import first_fold, fit_selected

PENALTIES = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
FOLDS = 5
"""Parts of the training set, one of which chooses."""


class Linear(Evaluation):
    """Top-1 on ``data.val`` of a logistic regression trained on ``data.probe``.

    Args:
        penalties: weights of the squared norm to choose from, on a stratified fifth of ``data.probe``.
    """

    protocol = (
        "logistic regression on standardised frozen features, to convergence; penalty chosen on a stratified fifth of "
        "data.probe (the strongest with one image a class), fitted again on all of it, scored once on data.val"
    )

    def __init__(self, penalties: list[float] = PENALTIES) -> None:
        if not penalties or min(penalties) <= 0:
            raise ValueError(f"penalties={penalties}: should be a list of positive numbers, e.g. [1.0, 0.01, 0.0001]")
        self.penalties = penalties

    def design(self, probe: Subset, seed: int) -> dict[str, Any]:
        """How many images are fitted with each penalty, and how many choose one."""
        selection = first_fold(torch.from_numpy(probe.labels), self.penalties, FOLDS)
        return {"fit": len(probe.samples) - selection, "selection": selection}

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``top1``, its ``standard_error`` and the chosen ``penalty``."""
        features, labels = subject.features("probe")
        classifier, penalty = fit_selected(features, labels, subject.num_classes, self.penalties, FOLDS, subject.seed)
        queries, expected = subject.features("val")
        accuracy = classifier.accuracy(queries, expected)
        return {"top1": accuracy, "standard_error": standard_error(accuracy, len(expected)), "penalty": penalty}
