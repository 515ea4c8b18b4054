"""Linear probe with a few labels a class, over several draws of which images are labelled."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import torch

from ssl_vit.config import InputError
from ssl_vit.evaluation.base import Evaluation, Subject, Subset
from ssl_vit.evaluation.logistic import fit_selected

PENALTIES = [1.0, 1e-1, 1e-2, 1e-3, 1e-4]
"""Weaker ones change nothing: so few images are told apart without an error."""


class FewShot(Evaluation):
    """Mean top-1 on ``data.val`` of logistic regressions trained on a few images a class of ``data.probe``.

    Args:
        shots: labelled images a class; each is reported as top1_shotsN, the last also as top1
        draws: random choices of those images; draw i is the same for every encoder and step
        penalties: weights of the squared norm to choose from, by five-fold cross-validation on the labelled images
    """

    protocol = (
        "logistic regression on a few labelled images a class of data.probe, penalty by cross-validation on those "
        "images alone (the strongest with one image a class), scored on data.val; mean over draws"
    )

    def __init__(self, shots: list[int] = [1, 5, 10], draws: int = 10, penalties: list[float] = PENALTIES) -> None:  # noqa: B006
        if not shots or min(shots) < 1:
            raise ValueError(f"shots={shots}: should be a list of numbers of at least 1, e.g. [1, 5, 10]")
        if draws < 1:
            raise ValueError(f"draws={draws}: should be at least 1")
        self.shots, self.draws, self.penalties = shots, draws, penalties

    def check(self, probe: Subset | None) -> None:
        """Every class needs as many labelled images as the largest of ``shots``."""
        counts = np.bincount(probe.labels) if probe else np.zeros(0)
        least = int(counts[counts > 0].min()) if counts.any() else max(self.shots)
        if least < max(self.shots):
            raise InputError(
                f"evals.few_shot.shots={self.shots}: the smallest class of data.probe has only {least} images; "
                "allowed: up to that"
            )

    def design(self, probe: Subset, seed: int) -> dict[str, Any]:
        """The seeds of the draws."""
        return {"seeds": self._seeds(seed)}

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``top1`` and for each number of shots ``top1_shotsN``, with the ``spread_shotsN`` over draws.

        ``standard_error`` is of ``top1``; it holds the spread over draws and the size of the validation set.
        """
        features, labels = subject.features("probe")
        queries, expected = subject.features("val")
        results, mean, spread = {}, 0.0, 0.0
        for shots in self.shots:
            accuracies = []
            for seed in self._seeds(subject.seed):
                chosen = self._draw(labels.cpu(), shots, seed)
                folds = min(5, shots)
                classifier, _ = fit_selected(
                    features[chosen], labels[chosen], subject.num_classes, self.penalties, folds, subject.seed, folds
                )
                accuracies.append(classifier.accuracy(queries, expected))
            mean = statistics.fmean(accuracies)
            spread = statistics.stdev(accuracies) if self.draws > 1 else 0.0
            results |= {f"top1_shots{shots}": mean, f"spread_shots{shots}": spread}
        error = math.sqrt(spread**2 / self.draws + mean * (1 - mean) / len(expected))
        return {"top1": mean, "standard_error": error} | results

    def _seeds(self, seed: int) -> list[int]:
        return [seed + draw for draw in range(self.draws)]

    def _draw(self, labels: torch.Tensor, shots: int, seed: int) -> torch.Tensor:
        noise = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
        members = [(labels == label).nonzero().flatten() for label in labels.unique()]
        return torch.cat([m[noise[m].argsort()[:shots]] for m in members])
