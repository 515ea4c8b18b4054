"""A grid of linear classifiers on frozen features, trained together in one pass (after DINOv2, arXiv 2304.07193, B.3).

The features are extracted once. Every combination of learning rate, weight decay, pooling and number of last blocks
is a classifier of its own; those that share their input share its matrix products.
"""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ssl_vit.config import InputError
from ssl_vit.data.order import derive_seed
from ssl_vit.data.views import CropView
from ssl_vit.encoders.base import Tokens
from ssl_vit.evaluation.base import Evaluation, Subject, Subset, held_count, hold_out, standard_error
from ssl_vit.evaluation.features import outputs
from ssl_vit.evaluation.linear_heads import Choice, LinearHeads
from ssl_vit.modules.pools import check_pools, side_by_side

logger = logging.getLogger(__name__)

RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
DECAYS = [0.0, 1e-3, 1e-1]
HELD = 0.2
"""Share of the training set that chooses."""


class Sweep(Evaluation):
    """Top-1 on ``data.val`` of the linear classifier that is best on a fifth of ``data.probe`` held out from training.

    All classifiers see standardised features and the same batches, under SGD with momentum and a cosine. The chosen one
    is trained again on all of ``data.probe``.

    Args:
        last_blocks: numbers of last blocks (stages of a Swin) whose features stand side by side
        pools: class token (token), mean of the patches (avg), or both; without class token only avg counts
        learning_rates: peak learning rates
        weight_decays: weights of the squared norm
        epochs: passes over the features
        min_steps: small sets are passed over until so many steps are done
        batch_size: features a step
        views: crops and flips of each training image beside its centre crop, drawn once
    """

    protocol = (
        "linear classifiers on standardised frozen features; learning rate, weight decay, pooling and number of last "
        "blocks chosen on a stratified fifth of data.probe held out from training; the chosen one trained again on all "
        "of data.probe and scored once on data.val"
    )

    def __init__(
        self,
        last_blocks: list[int] = [1, 4],  # noqa: B006
        pools: list[str] = ["token", "avg", "both"],  # noqa: B006
        learning_rates: list[float] = RATES,
        weight_decays: list[float] = DECAYS,
        epochs: int = 10,
        min_steps: int = 500,
        batch_size: int = 512,
        views: int = 0,
    ) -> None:
        check_pools(pools)
        for name, values, least in (
            ("last_blocks", last_blocks, 1), ("learning_rates", learning_rates, 1e-12),
            ("weight_decays", weight_decays, 0), ("epochs", [epochs], 1), ("min_steps", [min_steps], 0),
            ("batch_size", [batch_size], 1), ("views", [views], 0),
        ):  # fmt: skip
            if not values or min(values) < least:
                raise ValueError(f"{name}={values}: allowed: at least one number, none below {least:g}")
        self.last_blocks, self.pools, self.epochs, self.batch_size = sorted(last_blocks), pools, epochs, batch_size
        self.learning_rates, self.weight_decays, self.views = learning_rates, weight_decays, views
        self.min_steps = min_steps
        self.widths: list[int] = []
        self.parts: tuple[str, ...] = ()

    def check(self, probe: Subset | None) -> None:
        """Two images at least must be left to choose on."""
        if probe is not None and held_count(probe.labels, HELD) < 2:
            raise InputError(
                f"evals.sweep: {len(probe.samples)} labelled images of {len(np.unique(probe.labels))} classes leave "
                "too few to choose on; give more, two or more of a class (data.probe), or take evals.knn"
            )

    def design(self, probe: Subset, seed: int) -> dict[str, Any]:
        """How many images train the grid, and how many choose from it."""
        selection = held_count(probe.labels, HELD)
        return {"fit": len(probe.samples) - selection, "selection": selection}

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``top1``, its ``standard_error``, ``selection_top1`` and what was chosen."""
        fitting, selection = hold_out(subject.subset("probe"), HELD)
        trained, labels = self._features(subject, fitting, self.views)
        held, held_labels = self._features(subject, selection, 0)
        columns = self._columns()
        grid = [
            Choice(last, pool, rate, decay)
            for last, pool in columns
            for rate in self.learning_rates
            for decay in self.weight_decays
        ]
        scores = self._train(trained, labels, grid, columns, subject).accuracies(held, held_labels)
        best = max(range(len(grid)), key=lambda i: (scores[i], -i))
        chosen = grid[best]
        logger.info("sweep: %s is best of %d on the held-out fifth: %.4f", chosen, len(grid), scores[best])
        if len(self.learning_rates) > 2 and chosen.rate in (min(self.learning_rates), max(self.learning_rates)):
            logger.warning("sweep: the best learning rate, %g, is at the end of the grid; a wider one may do better",
                           chosen.rate)  # fmt: skip
        if self.views:
            held, held_labels = self._features(subject, selection, self.views)
        final = self._train(torch.cat([trained, held]), torch.cat([labels, held_labels]), [chosen], columns, subject)
        queries, expected = self._features(subject, subject.subset("val"), 0)
        accuracy = final.accuracies(queries, expected)[0]
        return {
            "top1": accuracy,
            "standard_error": standard_error(accuracy, len(expected)),
            "selection_top1": scores[best],
            "classifiers": float(len(grid)),
            "last_blocks": float(chosen.last),
            "token": float(chosen.pool != "avg"),
            "avg": float(chosen.pool != "token"),
            "learning_rate": chosen.rate,
            "weight_decay": chosen.decay,
        }

    def _features(self, subject: Subject, subset: Subset, views: int) -> tuple[Tensor, Tensor]:
        """Class tokens and means of the last blocks, float32 (n, W), from the last block backwards, and labels."""

        def forward(batch: dict[str, Tensor]) -> Tensor:
            stages = [-i for i in range(1, max(self.last_blocks) + 1)]
            try:
                found = cast(list[Tokens], subject.objective(batch, call="intermediates", stages=stages))
            except ValueError as error:
                raise InputError(f"evals.sweep.last_blocks={self.last_blocks}: {error}") from None
            self.widths = [tokens.patches.shape[2] for tokens in found]
            self.parts = ("token", "avg") if all(tokens.prefix.shape[1] for tokens in found) else ("avg",)
            return side_by_side(found, "both" if len(self.parts) == 2 else "avg")

        crop = CropView(subject.img_size, (0.35, 1.0), (0.75, 4 / 3), 0.5, subject.pixels.interpolation)
        found = [outputs(subject, subset, forward)]
        for view in range(views):
            found.append(outputs(subject, subset, forward, crop, derive_seed(subject.seed, view)))
        return torch.cat([features for features, _ in found]), torch.cat([labels for _, labels in found])

    def _columns(self) -> dict[tuple[int, str], Tensor]:
        """Which columns of the features each input has."""
        places, start = [], 0
        for width in self.widths:
            for part in self.parts:
                places.append((part, torch.arange(start, start + width)))
                start += width
        counts = {last: last * len(self.parts) for last in self.last_blocks}
        pools = self.pools if "token" in self.parts else ["avg"]
        return {
            (last, pool): torch.cat([where for part, where in places[: counts[last]] if pool in (part, "both")])
            for last in self.last_blocks
            for pool in pools
        }

    def _train(
        self,
        features: Tensor,
        labels: Tensor,
        grid: list[Choice],
        columns: dict[tuple[int, str], Tensor],
        subject: Subject,
    ) -> LinearHeads:
        """All classifiers of a grid, every one of them on the same batches."""
        heads = LinearHeads(features, grid, columns, subject.num_classes)
        generator = torch.Generator().manual_seed(subject.seed)
        steps_an_epoch = -(-len(features) // self.batch_size)
        epochs = max(self.epochs, -(-self.min_steps // steps_an_epoch))
        total = epochs * steps_an_epoch
        for epoch in range(epochs):
            order = torch.randperm(len(features), generator=generator).to(features.device)
            for number, chosen in enumerate(order.split(self.batch_size)):
                subject.pause_point()
                done = (epoch * steps_an_epoch + number) / total
                heads.step(features[chosen], labels[chosen], 0.5 + 0.5 * math.cos(math.pi * done))
        return heads
