"""What an evaluation gets and gives: a trained objective and labelled sets in, a dict of numbers out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_vit.config import InputError
from ssl_vit.data.bad_samples import BadReport
from ssl_vit.data.index import Index
from ssl_vit.data.loader import Pixels
from ssl_vit.data.workers import STALL, LoaderFailed
from ssl_vit.encoders.base import Tokens


@dataclass(frozen=True)
class Subset:
    """Some samples of an index, in a stated order.

    Args:
        index: the shards.
        samples: sample numbers, int64 (n,).
    """

    index: Index
    samples: np.ndarray

    @classmethod
    def all(cls, index: Index) -> Subset:
        """Every sample of an index."""
        return cls(index, np.arange(len(index)))

    @classmethod
    def spread(cls, index: Index, count: int) -> Subset:
        """At most ``count`` samples at even distances."""
        count = min(count, len(index))
        return cls(index, np.arange(count) * len(index) // count)

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,)."""
        return np.asarray(self.index.samples["label"][self.samples], dtype=np.int64)


def _by_key(subset: Subset) -> list[int]:
    """The places of a set's samples in the order of the hashes of their keys, which no packing changes."""
    digests = [hashlib.sha256(subset.index.key(int(sample)).encode()).digest() for sample in subset.samples]
    return sorted(range(len(digests)), key=lambda i: (digests[i], int(subset.samples[i])))


def first_by_key(subset: Subset, count: int) -> Subset:
    """``count`` samples of a set, chosen by the hash of each sample's key, in the set's own order."""
    return Subset(subset.index, subset.samples[np.sort(_by_key(subset)[:count])])


def split_by_key(subset: Subset, share: float) -> tuple[Subset, Subset]:
    """Two parts of a labelled set, stratified by class and decided by the hash of each sample's key.

    Args:
        subset: labelled samples.
        share: of each class that goes to the second part, at least one sample of a class with two or more.
    """
    order, ranks, sizes = _in_classes(subset)
    return _parts(subset, order[ranks < np.minimum(np.maximum(np.rint(sizes * share), 1), sizes - 1)])


def hold_out(subset: Subset, share: float) -> tuple[Subset, Subset]:
    """As :func:`split_by_key`, but the second part has the share of the whole set, whatever the classes' sizes.

    Of two classes the larger gives more, a class of few samples perhaps none, and each keeps one in the first part.
    """
    order, ranks, sizes = _in_classes(subset)
    spare = np.flatnonzero(ranks < sizes - 1)
    first = np.argsort((ranks[spare] + 0.5) / sizes[spare], kind="stable")
    return _parts(subset, order[spare[first[: held_count(subset.labels, share)]]])


def held_count(labels: np.ndarray, share: float) -> int:
    """How many samples of a set with these labels :func:`hold_out` gives to the second part."""
    return min(round(len(labels) * share), len(labels) - len(np.unique(labels)))


def _in_classes(subset: Subset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the samples of a set in the order of :func:`_by_key`: places, ranks within their classes, sizes of those."""
    order = np.array(_by_key(subset), dtype=np.int64)
    _, numbers, sizes = np.unique(subset.labels[order], return_inverse=True, return_counts=True)
    ranks = np.empty_like(order)
    ranks[np.argsort(numbers, kind="stable")] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order, ranks, sizes[numbers]


def _parts(subset: Subset, places: np.ndarray) -> tuple[Subset, Subset]:
    """A set without the samples at some places, and those samples, both in the set's own order."""
    second = np.zeros(len(subset.samples), dtype=bool)
    second[places] = True
    return Subset(subset.index, subset.samples[~second]), Subset(subset.index, subset.samples[second])


def _no_data(reason: str) -> None:
    raise LoaderFailed(reason)


@dataclass
class Subject:
    """What is being judged, with features that are extracted once and shared by all evaluations of a step.

    Args:
        objective: as prepared for training, or plain; called only through its own forward.
        pool: ``encoder.pool``, which needs no weights.
        img_size: (H, W) of the evaluation view.
        pixels: decoding, normalisation, centre crop.
        device: where the objective is.
        images: pictures for label-free measures.
        probe: labelled samples that probes train on, None without labels.
        val: labelled samples that are scored, None without labels.
        seed: of the run.
        batch_size: images a forward pass.
        workers: loader processes.
        stall_timeout: seconds without a batch after which they are given up.
        step: optimizer steps done.
        picture: called with a name and a uint8 (H, W, 3) picture.
        on_bad: called by every process after a set, each with those of its samples that did not decode.
        on_no_data: called with the reason when samples cannot be read; asks for a stop at the next pause, or raises.
        pause_point: called by every process between batches and evaluations; may raise to leave them.
        kept: by the id of a set, the samples of it that decode.
    """

    objective: nn.Module
    pool: Callable[[Tokens], Tensor]
    img_size: tuple[int, int]
    pixels: Pixels
    device: torch.device
    images: Subset
    probe: Subset | None = None
    val: Subset | None = None
    seed: int = 0
    batch_size: int = 256
    workers: int = 0
    stall_timeout: float = STALL
    step: int = 0
    picture: Callable[[str, np.ndarray], None] = lambda name, image: None
    on_bad: Callable[[list[BadReport]], None] = lambda reports: None
    on_no_data: Callable[[str], None] = _no_data
    pause_point: Callable[[], None] = lambda: None
    kept: dict[int, np.ndarray] = field(default_factory=dict)
    _features: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def features(self, part: str) -> tuple[Tensor, Tensor]:
        """Pooled features float32 (n, D) and labels int64 (n,) of ``"probe"``, ``"val"`` or ``"images"``.

        Raises:
            InputError: the set has no labels or is not there.
        """
        from ssl_vit.evaluation.features import extract

        subset = self.subset(part)
        if id(subset) not in self._features:  # one set may play two parts
            self._features[id(subset)] = extract(self, subset)
        return self._features[id(subset)]

    def subset(self, part: str) -> Subset:
        """The samples of ``"probe"``, ``"val"`` or ``"images"``."""
        subset = {"probe": self.probe, "val": self.val, "images": self.images}[part]
        if subset is None:
            raise InputError(
                f"data.{part}: this evaluation needs labelled images; give data.val=... (and data.probe=...)"
            )
        return subset

    def places_in_probe(self) -> Tensor | None:
        """Where each image of ``val`` that decodes stands among those of ``probe``, -1: nowhere; int64 (m,).

        None where the two are of different data. Call it after :meth:`features` of both.
        """
        probe, val = self.subset("probe"), self.subset("val")
        if probe.index.fingerprint != val.index.fingerprint:
            return None
        places = np.full(len(probe.index), -1)
        bank = self.kept[id(probe)]
        places[bank] = np.arange(len(bank))
        found = places[self.kept[id(val)]]
        return torch.from_numpy(found).to(self.device) if (found >= 0).any() else None

    @property
    def num_classes(self) -> int:
        """Number of classes of the labelled sets."""
        parts = [part for part in (self.probe, self.val) if part is not None]
        return max(int(part.labels.max()) for part in parts) + 1

    def at(self, step: int) -> Subject:
        """The same subject with features to be extracted anew."""
        self.step, self._features = step, {}
        return self


class Evaluation:
    """One measurement; its constructor arguments are its section of a recipe."""

    labelled = True
    """Whether it needs ``data.val``."""

    call: str | None = None
    """What it asks of an objective that an encoder alone has not, of :data:`ssl_vit.objectives.base.CALLS`."""

    protocol = ""
    """What is measured and what chose anything that was chosen, for result.json."""

    def check(self, probe: Subset | None) -> None:
        """Refuse, before anything starts, labelled sets that this evaluation cannot use.

        Raises:
            InputError: saying why.
        """

    def design(self, probe: Subset, seed: int) -> dict[str, Any]:
        """What beside the protocol decides its numbers, for result.json: sizes of the parts of ``probe``, seeds."""
        return {}

    def __call__(self, subject: Subject) -> dict[str, float]:
        """Numbers by name, without the evaluation's own name; the same on every process."""
        raise NotImplementedError


def standard_error(accuracy: float, count: int) -> float:
    """Standard error of an accuracy measured on ``count`` independent samples."""
    return float(np.sqrt(accuracy * (1 - accuracy) / count))
