"""Multinomial logistic regression on features, to convergence; convex, so its result does not depend on a start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Classifier:
    """A linear classifier on standardised features.

    Args:
        mean: (D,) of the training features.
        std: (D,) of the training features.
        weight: (K, D).
        bias: (K,).
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of right predictions for features (n, D) and labels (n,)."""
        scores = ((features.to(self.weight.dtype) - self.mean) / self.std) @ self.weight.T + self.bias
        return (scores.argmax(dim=1) == labels).double().mean().item()


def fit_path(
    features: Tensor, labels: Tensor, num_classes: int, penalties: Sequence[float], max_iter: int = 200
) -> list[Classifier]:
    """One classifier a penalty: mean cross-entropy + penalty / 2 * squared norm of the weights, by L-BFGS.

    ``penalty`` is ``1 / (C n)`` in scikit-learn's terms. Each fit starts from the one before it, so penalties
    go fastest in descending order. Small sets are fitted in float64.

    Args:
        features: (n, D).
        labels: int64 (n,).
        num_classes: K.
        penalties: weights of the squared norm.
        max_iter: L-BFGS iterations a penalty at the most.
    """
    small = features.numel() <= 2_000_000
    dtype = torch.float64 if small else torch.float32
    features = features.to(dtype)
    mean, std = features.mean(dim=0), features.std(dim=0, unbiased=False)
    std = torch.where(std > 1e-8 * mean.abs().clamp_min(1), std, torch.ones_like(std))
    standard = (features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], dtype=dtype, device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=dtype, device=features.device, requires_grad=True)
    classifiers = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iter,
            tolerance_grad=1e-8 if small else 1e-6,
            tolerance_change=1e-12 if small else 1e-9,
            line_search_fn="strong_wolfe",
        )

        def closure(optimizer: torch.optim.LBFGS = optimizer, penalty: float = penalty) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(standard @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        classifiers.append(Classifier(mean, std, weight.detach().clone(), bias.detach().clone()))
    return classifiers


def stratified_folds(labels: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """A fold number for each label, int64 (n,), every class spread evenly over the folds."""
    noise = torch.rand(len(labels), generator=generator)
    assigned = torch.empty(len(labels), dtype=torch.int64)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        assigned[members[noise[members].argsort()]] = torch.arange(len(members)) % folds
    return assigned


def fit_selected(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalties: Sequence[float],
    folds: int,
    seed: int,
    rounds: int = 1,
) -> tuple[Classifier, float]:
    """Choose the penalty on held-out folds of the training set, then fit all of it.

    Args:
        features: (n, D).
        labels: int64 (n,).
        num_classes: K.
        penalties: to choose from.
        folds: the training set is cut into that many parts.
        seed: of the cut.
        rounds: number of folds that take a turn as the held-out part; ``folds`` is full cross-validation.

    Returns:
        The classifier and the chosen penalty, the largest of equally good ones.
    """
    penalties = sorted(penalties, reverse=True)
    if len(penalties) == 1:
        return fit_path(features, labels, num_classes, penalties)[0], penalties[0]
    assigned = stratified_folds(labels.cpu(), folds, torch.Generator().manual_seed(seed)).to(labels.device)
    scores = torch.zeros(len(penalties), dtype=torch.float64)
    for fold in range(rounds):
        held = assigned == fold
        path = fit_path(features[~held], labels[~held], num_classes, penalties)
        scores += torch.tensor([c.accuracy(features[held], labels[held]) for c in path], dtype=torch.float64)
    best = int(scores.argmax())
    return fit_path(features, labels, num_classes, penalties[: best + 1])[-1], penalties[best]
