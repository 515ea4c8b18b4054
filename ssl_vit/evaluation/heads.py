"""Accuracy of each of several classifiers that were trained together on a frozen encoder."""

from __future__ import annotations

from ssl_vit.config import InputError
from ssl_vit.evaluation.base import Evaluation, Subject, standard_error
from ssl_vit.evaluation.features import outputs


class Heads(Evaluation):
    """Share of ``data.val`` that each classifier of ``objective.name=probe`` gets right; centre crops."""

    call = "decide"
    protocol = (
        "each classifier on centre crops of data.val; top1 is the best of them on data.val itself, as the published "
        "protocols with several have it: with many classifiers that flatters, evals.sweep does not"
    )

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``top1`` of the best, its ``standard_error``, and where there are several ``top1_NAME`` of each.

        Raises:
            InputError: the objective has no such classifiers.
        """
        objective = getattr(subject.objective, "module", subject.objective)
        names = list(getattr(objective, "heads", ()))
        if not names:
            raise InputError("evals.heads: needs objective.name=probe; evals.accuracy measures other classifiers")
        said, labels = outputs(subject, subject.subset("val"), lambda b: subject.objective(b, call="decide"))
        right = (said.long() == labels[:, None]).double().mean(dim=0).tolist()
        best = max(right)
        results = {"top1": best, "standard_error": standard_error(best, len(labels))}
        return results | ({f"top1_{n}": value for n, value in zip(names, right, strict=True)} if len(names) > 1 else {})
