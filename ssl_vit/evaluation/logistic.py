"""Multinomial logistic regression on features, to convergence; convex, so its result does not depend on a start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

SMALL = 2_000_000
"""Numbers in a set of features up to which it is fitted in float64."""


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
    features: Tensor, labels: Tensor, num_classes: int, penalties: Sequence[float], max_iter: int = 500
) -> list[Classifier]:
    """One classifier a penalty: mean cross-entropy + penalty / 2 * squared norm of the weights, by L-BFGS.

    ``penalty`` is ``1 / (C n)`` in scikit-learn's terms. Each fit starts from the one before it, so penalties
    go fastest in descending order. Small sets are fitted in float64; the features stay on their device.

    Args:
        features: (n, D).
        labels: int64 (n,).
        num_classes: K.
        penalties: weights of the squared norm.
        max_iter: L-BFGS iterations a penalty at the most.
    """
    dtype = torch.float64 if features.numel() <= SMALL else torch.float32
    features = features.to(dtype)
    mean, std = features.mean(dim=0), features.std(dim=0, unbiased=False)
    std = torch.where(std > 1e-8 * mean.abs().clamp_min(1), std, torch.ones_like(std))
    standard = (features - mean) / std
    # along the principal axes, each scaled by a bound of its curvature (Boehning 1992), all directions are about
    # equally steep: a tenth of the iterations, and the penalty stays what it is, since a rotation keeps lengths
    variances, axes = torch.linalg.eigh(standard.T.double() @ standard.double() / len(standard))
    # where the features do not vary a penalised weight is zero: fewer images than features need as many axes only
    varying = variances > 1e-12 * variances[-1]
    variances, axes = variances[varying], axes[:, varying]
    rotated = standard @ axes.to(dtype)
    weights = torch.zeros(num_classes, rotated.shape[1] + 1, dtype=torch.float64)  # the last column is the bias
    classifiers = []
    for penalty in penalties:
        scale = torch.cat([variances.clamp_min(0) / 2 + penalty, variances.new_full((1,), 0.5)]).sqrt().cpu()
        found = _minimize(
            lambda flat, penalty=penalty, scale=scale: _loss_and_gradient(flat, scale, rotated, labels, penalty),
            (weights * scale).numpy().ravel(),
            max_iter,
            small=dtype == torch.float64,
        )
        weights = torch.from_numpy(found).view_as(weights) / scale
        own = weights.to(features.device)
        classifiers.append(Classifier(mean, std, (own[:, :-1] @ axes.T).to(dtype), own[:, -1].to(dtype)))
    return classifiers


def _minimize(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray, max_iter: int, small: bool
) -> np.ndarray:
    options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "gtol": 1e-7 if small else 1e-5, "ftol": 0.0}
    threads = torch.get_num_threads()
    if small:
        # threads that wait for each other in thousands of tiny products make this thirty times slower
        torch.set_num_threads(1)
    try:
        return minimize(function, start, jac=True, method="L-BFGS-B", options=options).x.copy()
    finally:
        torch.set_num_threads(threads)


def _loss_and_gradient(
    flat: np.ndarray, scale: Tensor, rotated: Tensor, labels: Tensor, penalty: float
) -> tuple[float, np.ndarray]:
    """Value and gradient, by weights times ``scale``, of the penalised cross-entropy, the penalty not on the bias.

    Float64 out.
    """
    weights = (torch.from_numpy(flat).view(-1, len(scale)) / scale).to(rotated)
    weight, bias = weights[:, :-1], weights[:, -1]
    log_share = torch.log_softmax(rotated @ weight.T + bias, dim=1)  # (n, K)
    loss = -log_share.gather(1, labels[:, None]).double().mean() + penalty / 2 * weight.double().square().sum()
    residual = log_share.exp()
    residual[torch.arange(len(labels), device=labels.device), labels] -= 1
    residual /= len(labels)
    gradient = torch.cat([residual.T @ rotated + penalty * weight, residual.sum(dim=0)[:, None]], dim=1)
    return loss.item(), (gradient.double().cpu() / scale).numpy().ravel()


def stratified_folds(labels: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """A fold number for each label, int64 (n,), every class spread evenly over the folds."""
    noise = torch.rand(len(labels), generator=generator)
    assigned = torch.empty(len(labels), dtype=torch.int64)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        assigned[members[noise[members].argsort()]] = torch.arange(len(members)) % folds
    return assigned


def first_fold(labels: Tensor, penalties: Sequence[float], folds: int) -> int:
    """How many images are held out of the first fit; 0 with one image a class, or one penalty."""
    counts = labels.bincount()
    return int((-(-counts // folds)).sum()) if len(penalties) > 1 and counts.max() > 1 else 0


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

    Where nothing can be held out (:func:`first_fold`) it is the largest.

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
    if not first_fold(labels, penalties, folds):
        return fit_path(features, labels, num_classes, penalties[:1])[0], penalties[0]
    assigned = stratified_folds(labels.cpu(), folds, torch.Generator().manual_seed(seed)).to(labels.device)
    scores = torch.zeros(len(penalties), dtype=torch.float64)
    for fold in range(rounds):
        held = assigned == fold
        path = fit_path(features[~held], labels[~held], num_classes, penalties)
        scores += torch.tensor([c.accuracy(features[held], labels[held]) for c in path], dtype=torch.float64)
    best = int(scores.argmax())
    return fit_path(features, labels, num_classes, penalties[: best + 1])[-1], penalties[best]
