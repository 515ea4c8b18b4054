"""The data of a run: what is trained on, what probes train on, what is scored, and by which classes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ssl_vit.config import InputError
from ssl_vit.data.index import Index
from ssl_vit.data.order import Order, Stream, derive_seed
from ssl_vit.data.sources import open_source
from ssl_vit.evaluation.base import Subset, first_by_key, split_by_key
from ssl_vit.recipe import DataSection, Recipe

logger = logging.getLogger(__name__)

LABEL_FREE_IMAGES = 2048


def open_data(data: DataSection, spec: str, opened: dict[str, Index] | None = None) -> Index:
    """The shards of one source; ``opened`` keeps it, for a folder of many images takes long to list."""
    opened = {} if opened is None else opened
    if spec not in opened:
        cache = Path(data.cache) if data.cache else None
        opened[spec] = open_source(spec, labels=data.labels, cache=cache, cache_size=data.cache_size)
    return opened[spec]


def open_train(data: DataSection, opened: dict[str, Index] | None = None) -> list[Index]:
    """The training sources, each with ``data.limit`` images at most."""
    return [limited(open_data(data, spec, opened), data.limit) for spec in train_specs(data)]


def limited(index: Index, count: int | None) -> Index:
    """At most ``count`` samples of an index: of each class its share, at even distances in the order of the shards."""
    if count is None or count >= len(index):
        return index
    by_class = np.argsort(index.samples["label"], kind="stable")
    chosen = np.sort(by_class[np.arange(count) * len(index) // count])
    counts = np.histogram(chosen, index.starts)[0]
    shards = [replace(shard, nsamples=int(n)) for shard, n in zip(index.shards, counts, strict=True)]
    return Index(index.root, shards, np.array(index.samples[chosen]), index.classes, index.cache)


def train_specs(data: DataSection) -> list[str]:
    """``data.train`` as a list."""
    return [data.train] if isinstance(data.train, str) else list(data.train or [])


@dataclass(frozen=True)
class Sets:
    """The data of a run.

    Args:
        train: one index a training source.
        images: for label-free measures and pictures.
        rule: what probes train on and what is scored, in words.
        probe: labelled samples that probes train on.
        val: labelled samples that are scored.
    """

    train: list[Index]
    images: Subset
    rule: str
    probe: Subset | None = None
    val: Subset | None = None

    @property
    def fingerprint(self) -> list[str]:
        """Hashes of the training data: a resumed run must see the same."""
        return [index.fingerprint for index in self.train]

    def stream(self, recipe: Recipe) -> Stream:
        """The order in which training sees them."""
        data = recipe.data
        orders = [
            Order(index.shard_sizes.tolist(), derive_seed(recipe.seed, i), data.num_lanes, data.window)
            for i, index in enumerate(self.train)
        ]
        try:
            return Stream(orders, recipe.seed, data.weights, data.repeats, data.fixed_passes)
        except ValueError as error:
            raise InputError(f"data: {error}") from None


def open_sets(data: DataSection, opened: dict[str, Index] | None = None) -> Sets:
    """Open all sources; the rule for what probes train on is the contract's (``data.probe``)."""
    train = open_train(data, opened)
    if data.val is None:
        if not train:
            raise InputError("data.val: is required; give labelled images as data.val=folder:/my/labelled")
        images = Subset.spread(train[0], LABEL_FREE_IMAGES)
        return Sets(train, images, "no data.val: label-free measures on data.train")
    val = open_data(data, data.val, opened)
    if not val.labelled:
        raise InputError(
            f"data.val={data.val}: has no labels; give class folders, or leave it out for label-free measures"
        )
    everything = Subset.all(val)
    if len(np.unique(everything.labels)) < 2:
        raise InputError(
            f"data.val={data.val}: all {len(val)} images are of one class; evaluations need two or more (a folder "
            "each), or leave it out for label-free measures"
        )
    if data.probe is not None:
        index = open_data(data, data.probe, opened)
        if not index.labelled:
            raise InputError(f"data.probe={data.probe}: has no labels; give class folders, or leave it out")
        if difference := _difference(index, [val], "data.val"):
            raise InputError(f"data.probe={data.probe}: {difference}")
        probe, scored, rule = Subset.all(index), everything, "probes train on data.probe, scored on data.val"
    elif len(train) == 1 and train[0].labelled and not _difference(train[0], [val], "data.val"):
        probe, scored, rule = Subset.all(train[0]), everything, "probes train on data.train, scored on data.val"
    else:
        rule = "probes train on 80 % of data.val, scored on the other 20 % (stratified, by hash of the key)"
        if len(train) == 1 and train[0].labelled:
            rule += f", since data.train {_difference(train[0], [val], 'data.val')}"
        probe, scored = split_by_key(everything, 0.2)
    if data.probe_images is not None and data.probe_images < len(probe.samples):
        probe, rule = first_by_key(probe, data.probe_images), f"{rule}; training on {data.probe_images} images"
    if len(np.unique(probe.labels)) < 2:
        raise InputError(
            f"data.{'train' if data.probe is None else 'probe'}: all {len(probe.samples)} images that evaluations "
            "train on are of one class; give two or more classes, or more of its images (data.probe_images)"
        )
    return Sets(train, everything, rule, probe, scored)


def resolve_classes(recipe: Recipe, opened: dict[str, Index] | None = None) -> None:
    """An objective with ``num_classes`` learns the classes of ``data.train``; null becomes their number.

    Raises:
        InputError: training data without labels or with different classes, or other classes in ``data.val``.
    """
    data, stated = recipe.data, recipe.objective
    wrong = "accuracy" if stated["name"] == "probe" else "heads"
    if wrong in recipe.evals:
        right = "heads" if wrong == "accuracy" else "accuracy"
        raise InputError(f"evals.{wrong}: not with objective.name={stated['name']!r}; take evals.{right}")
    if "num_classes" not in stated:
        if "accuracy" in recipe.evals:
            raise InputError(f"evals.accuracy: objective.name={stated['name']!r} predicts no classes; leave it out")
        return
    sources = {f"data.train={spec}": open_data(data, spec, opened) for spec in train_specs(data)}
    train = list(sources.values())
    if data.val is not None and {"accuracy", "heads"} & set(recipe.evals):
        sources[f"data.val={data.val}"] = open_data(data, data.val, opened)
    for name, index in sources.items():
        missing = int((index.samples["label"] < 0).sum())
        if missing:
            raise InputError(
                f"{name}: {missing} of {len(index)} images have no label, and objective.name={stated['name']!r} learns "
                "from labels; give class folders (a folder a class), or labelled shards"
            )
        if index in train and index.classes == train[0].classes:  # without names, a source may lack some of the labels
            continue
        if difference := _difference(index, train, "data.train"):
            raise InputError(f"{name}: {difference}")
    count = max(len(index.classes or ()) or int(index.samples["label"].max()) + 1 for index in sources.values())
    if stated["num_classes"] is None:
        stated["num_classes"] = count
        logger.info("objective.num_classes: %d, the classes of data.train", count)
    elif stated["num_classes"] < count:
        raise InputError(f"objective.num_classes={stated['num_classes']}: data.train has {count}; give that, or null")


def _difference(index: Index, others: list[Index], of: str) -> str | None:
    """How the classes of a set differ from those of others, for a message about it; None: they do not.

    Where neither has class names, the labels that occur are compared.
    """
    ours, theirs = index.classes, others[0].classes
    if bool(ours) != bool(theirs):
        return f"{'has' if ours else 'lacks'} class names, {of} {'has' if theirs else 'lacks'} them; pack both alike"
    ours, theirs = ours or _labels([index]), theirs or _labels(others)
    if ours == theirs:
        return None
    lacks, more = [n for n in theirs if n not in ours], [n for n in ours if n not in theirs]
    parts = [f"lacks classes of {of}: {_few(lacks)}"] if lacks else []
    parts += [f"has classes that {of} lacks: {_few(more)}"] if more else []
    return "; ".join(parts) or f"has the classes of {of} in another order: {_few(ours)}; there: {_few(theirs)}"


def _labels(indices: list[Index]) -> list[str]:
    return [str(label) for label in np.unique(np.concatenate([index.samples["label"] for index in indices]))]


def _few(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
