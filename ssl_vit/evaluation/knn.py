"""Weighted nearest neighbours on frozen features (DINO, arXiv 2104.14294, appendix; Wu et al., arXiv 1805.01978)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_vit import distributed
from ssl_vit.evaluation.base import Evaluation, Subject, standard_error

logger = logging.getLogger(__name__)

BLOCK = 65_536
"""Images that vote compared at once: with a chunk of 1,024, 256 MB of similarities, however many vote."""


class KNN(Evaluation):
    """Top-1 of a weighted vote of the k most similar probe images: cosine similarity, weights exp(similarity / T).

    Args:
        k: neighbours; the first is reported as top1, each as top1_kN; never chosen on the validation set.
        temperature: T of the weights.
        chunk: validation images compared at once.
    """

    protocol = "the vote of the nearest images of data.probe, scored on data.val; an image is never its own neighbour"

    def __init__(self, k: list[int] = [20, 10, 100, 200], temperature: float = 0.07, chunk: int = 1024) -> None:  # noqa: B006
        if not k or min(k) < 1:
            raise ValueError(f"k={k}: should be a list of positive numbers, e.g. [20]")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: should be above 0, e.g. 0.07")
        self.k, self.temperature, self.chunk = k, temperature, chunk

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``top1``, its ``standard_error`` and ``top1_kN`` for each k."""
        bank, bank_labels = subject.features("probe")
        queries, labels = subject.features("val")
        own = subject.places_in_probe()
        most = len(bank) - (own is not None)
        if max(self.k) > most:
            logger.warning("knn: k is cut to the %d images of data.probe", most)
        ks = list(dict.fromkeys(min(k, most) for k in self.k))
        rank, size = distributed.rank(), distributed.world_size()
        own = own[rank::size] if own is not None else None
        correct = knn_correct(
            bank, bank_labels, queries[rank::size], labels[rank::size], ks, self.temperature, subject.num_classes,
            self.chunk, own,
        )  # fmt: skip
        accuracies = (distributed.all_sum(correct).double() / len(labels)).tolist()
        results = {"top1": accuracies[0], "standard_error": standard_error(accuracies[0], len(labels))}
        return results | {f"top1_k{k}": accuracy for k, accuracy in zip(ks, accuracies, strict=True)}


def knn_correct(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    ks: list[int],
    temperature: float,
    num_classes: int,
    chunk: int,
    own: Tensor | None = None,
) -> Tensor:
    """Number of right votes for each k, exact.

    Args:
        bank: (n, D) features that vote.
        bank_labels: int64 (n,).
        queries: (m, D).
        labels: int64 (m,).
        ks: neighbours, each at most n.
        temperature: of the weights.
        num_classes: number of classes.
        chunk: queries compared at once.
        own: int64 (m,), the place in the bank of each query itself, which does not vote; -1 and None: it is not in it.

    Returns:
        int64 (len(ks),).
    """
    correct = torch.zeros(len(ks), dtype=torch.int64, device=bank.device)
    for start in range(0, len(queries), chunk):
        some = own[start : start + chunk] if own is not None else None
        values, neighbours = nearest(bank, F.normalize(queries[start : start + chunk], dim=1), max(ks), some)
        weights, classes = (values / temperature).exp(), bank_labels[neighbours]
        for i, k in enumerate(ks):
            votes = weights.new_zeros((len(values), num_classes)).scatter_add_(1, classes[:, :k], weights[:, :k])
            correct[i] += (votes.argmax(dim=1) == labels[start : start + chunk]).sum()
    return correct


def nearest(bank: Tensor, queries: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k largest cosines of each query with the bank, descending, and their places in it; (m, k) each.

    Args:
        bank: (n, D), of any length.
        queries: (m, D), of length 1.
        k: at most n.
        own: see :func:`knn_correct`.
    """
    values, places = queries.new_zeros((len(queries), 0)), torch.zeros_like(queries[:, :0], dtype=torch.int64)
    for start in range(0, len(bank), BLOCK):
        similarity = queries @ F.normalize(bank[start : start + BLOCK], dim=1).T
        if own is not None:
            rows = ((own >= start) & (own < start + similarity.shape[1])).nonzero().flatten()
            similarity[rows, own[rows] - start] = -torch.inf
        largest, where = similarity.topk(min(k, similarity.shape[1]), dim=1)
        values, places = torch.cat([values, largest], dim=1), torch.cat([places, where + start], dim=1)
        if start:  # the largest of those so far, in order
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            places = places.gather(1, order)
    return values, places
