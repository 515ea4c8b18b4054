"""Accuracy of a trained classifier on the validation set."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_vit.config import InputError
from ssl_vit.evaluation.base import Evaluation, Subject, standard_error
from ssl_vit.evaluation.features import outputs


class Accuracy(Evaluation):
    """Share of ``data.val`` whose label is the classifier's first prediction, or among its first five; centre crops."""

    call = "predict"
    protocol = "the trained classifier on centre crops of data.val"

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``top1``, its ``standard_error``, and ``top5`` where there are more than five classes.

        Raises:
            InputError: the objective predicts no classes, or fewer than there are labels.
        """

        def hits(batch: dict[str, Tensor]) -> Tensor:
            """(B, 2): whether the label is the first of the sorted logits, and whether it is among the first five."""
            try:
                logits = subject.objective(batch, call="predict")
            except ValueError as error:
                raise InputError(f"accuracy: {error}") from None
            if logits.ndim != 2 or logits.shape[1] < subject.num_classes:
                raise InputError(
                    f"accuracy: predictions of shape {tuple(logits.shape)}; needed: (images, at least "
                    f"{subject.num_classes} classes)"
                )
            right = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch["label"][:, None]
            return torch.stack([right[:, 0], right.any(dim=1)], dim=1)

        found, labels = outputs(subject, subject.subset("val"), hits)
        top1, top5 = found.double().mean(dim=0).tolist()
        results = {"top1": top1, "standard_error": standard_error(top1, len(labels))}
        return results | ({"top5": top5} if subject.num_classes > 5 else {})
