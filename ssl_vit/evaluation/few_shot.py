"""Linear probe with a few labels a class, over several draws of which images are labelled."""

from __future__ import annotations

import math
import statistics

import torch

from ssl_vit.config import InputError
from ssl_vit.evaluation.base import Evaluation, Subject
from ssl_vit.evaluation.logistic import fit_selected

PENALTIES = [1.0, 1e-1, 1e-2, 1e-3, 1e-4]
"""Weaker ones change nothing: so few images are told apart without an error."""


class FewShot(Evaluation):
    """Mean top-1 on ``data.val`` of logistic regressions trained on a few images a class of ``data.probe``.

    Args:
        shots: labelled images a class.
        draws: random choices of those images; draw i is the same for every encoder and step.
        penalties: weights of the squared norm to choose from, by five-fold cross-validation on the labelled images.
    """

    def __init__(self, shots: int = 10, draws: int = 10, penalties: list[float] = PENALTIES) -> None:
        for name, value in (("shots", shots), ("draws", draws)):
            if value < 1:
                raise ValueError(f"{name}={value}: should be at least 1")
        self.shots, self.draws, self.penalties = shots, draws, penalties

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``top1`` and its ``standard_error``, which holds the spread over draws and the size of the validation set."""
        features, labels = subject.features("probe")
        queries, expected = subject.features("val")
        counts = torch.bincount(labels)
        if int(counts[counts > 0].min()) < self.shots:
            raise InputError(
                f"evals.few_shot.shots={self.shots}: the smallest class of data.probe has only "
                f"{int(counts[counts > 0].min())} images; allowed: up to that"
            )
        accuracies = []
        for draw in range(self.draws):
            chosen = self._draw(labels.cpu(), subject.seed + draw)
            folds = min(5, self.shots)
            penalties = self.penalties if folds > 1 else self.penalties[:1]
            classifier, _ = fit_selected(
                features[chosen], labels[chosen], subject.num_classes, penalties, folds, subject.seed, rounds=folds
            )
            accuracies.append(classifier.accuracy(queries, expected))
        mean = statistics.fmean(accuracies)
        spread = statistics.stdev(accuracies) / math.sqrt(self.draws) if self.draws > 1 else 0.0
        return {"top1": mean, "standard_error": math.sqrt(spread**2 + mean * (1 - mean) / len(expected))}

    def _draw(self, labels: torch.Tensor, seed: int) -> torch.Tensor:
        noise = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
        members = [(labels == label).nonzero().flatten() for label in labels.unique()]
        return torch.cat([m[noise[m].argsort()[: self.shots]] for m in members])
