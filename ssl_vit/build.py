"""From the sections of a recipe to objects; what a constructor refuses becomes the user's one clear message."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_vit.config import InputError, plain
from ssl_vit.data.index import Index
from ssl_vit.data.loader import IMAGENET_MEAN, IMAGENET_STD, Pixels
from ssl_vit.data.order import Order, Stream, derive_seed
from ssl_vit.data.sources import open_source
from ssl_vit.encoders.base import Encoder, create_encoder
from ssl_vit.encoders.weights import encoder_config, fill_encoder, fill_objective
from ssl_vit.evaluation.base import Evaluation, Subset, first_by_key, split_by_key
from ssl_vit.modules.target_cache import TargetCache
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import (
    FILLED,
    AnyRecipe,
    DataSection,
    EmbeddingRecipe,
    EvaluationRecipe,
    Recipe,
    RunSection,
    evaluation_class,
    objective_class,
)

logger = logging.getLogger(__name__)

LABEL_FREE_IMAGES = 2048
MOST_WORKERS = 16


def constructed(where: str, build: Callable[[], Any]) -> Any:
    """Call a constructor; what it refuses is the user's mistake, named with its section."""
    try:
        return build()
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def build_encoder(section: dict[str, Any]) -> Encoder:
    """The encoder of a recipe section, at its architecture's initialisation."""
    arguments = {key: value for key, value in section.items() if key != "init"}
    return constructed("encoder", lambda: create_encoder(**arguments))


def _fill_from_init(encoder: Encoder, section: dict[str, Any]) -> None:
    if section.get("init"):
        logger.info("encoder.init: %s", fill_encoder(encoder, Path(section["init"])))


def build_objective(recipe: Recipe) -> Objective:
    """The objective at its published initialisation, then filled from ``encoder.init`` and ``objective.init``."""
    torch.manual_seed(recipe.seed)
    encoder = build_encoder(recipe.encoder)
    arguments = {key: value for key, value in recipe.objective.items() if key not in ("name", "init")}
    cls = objective_class(recipe)
    for key in set(FILLED[1:]) & set(inspect.signature(cls).parameters):
        if (numbers := getattr(recipe.data, key)) is not None:
            arguments[key] = tuple(numbers)
    objective = constructed("objective", lambda: cls(encoder, **arguments))
    _fill_from_init(objective.encoder, recipe.encoder)
    objective.encoder_filled()
    if recipe.objective.get("init"):
        logger.info("objective.init: %s", fill_objective(objective, Path(recipe.objective["init"])))
    return objective


def build_frozen(recipe: EvaluationRecipe | EmbeddingRecipe) -> Objective:
    """An encoder that is only measured: from ``encoder.init``, else at its architecture's initialisation."""
    torch.manual_seed(recipe.seed)
    objective = Objective(build_encoder(recipe.encoder))
    _fill_from_init(objective.encoder, recipe.encoder)
    return objective.requires_grad_(False).eval()


def stated_pixels(init: str | None) -> dict[str, Any]:
    """Preprocessing that the file of an initial encoder states; empty for a bare file of weights."""
    with contextlib.suppress(InputError):
        return encoder_config(init).get("data", {}) if init else {}
    return {}


def resolve_pixels(data: DataSection, encoder: dict[str, Any]) -> Pixels:
    """Fill what the recipe leaves open: from the initial encoder's file, else the usual constants."""
    stated = stated_pixels(encoder.get("init"))
    chans = encoder.get("in_chans", 3)
    usual = {
        "mean": IMAGENET_MEAN if chans == 3 else (0.5,) * chans,
        "std": IMAGENET_STD if chans == 3 else (0.5,) * chans,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
    chosen: dict[str, Any] = {}
    for key, default in usual.items():
        given = getattr(data, key)
        if given is not None and key in stated and plain(given) != plain(stated[key]):
            logger.warning(
                "data.%s=%s overrides %s, with which the initial encoder was trained", key, given, stated[key]
            )
        chosen[key] = given if given is not None else stated.get(key, default)
        setattr(data, key, plain(chosen[key]))
    chosen["mean"], chosen["std"] = tuple(chosen["mean"]), tuple(chosen["std"])
    return Pixels(**chosen, in_chans=chans, max_pixels=data.max_pixels)


def open_data(data: DataSection, spec: str, opened: dict[str, Index] | None = None) -> Index:
    """The shards of one source; ``opened`` keeps it, for a folder of many images takes long to list."""
    opened = {} if opened is None else opened
    if spec not in opened:
        opened[spec] = open_source(spec, labels=data.labels, cache=Path(data.cache) if data.cache else None)
    return opened[spec]


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
        return constructed("data", lambda: Stream(orders, recipe.seed, data.weights, data.repeats, data.fixed_passes))


def open_sets(data: DataSection, opened: dict[str, Index] | None = None) -> Sets:
    """Open all sources; the rule for what probes train on is the contract's (``data.probe``)."""
    train = [open_data(data, spec, opened) for spec in train_specs(data)]
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
        if index.classes != val.classes:
            raise InputError(f"data.probe={data.probe}: {_difference(index.classes, val.classes, 'data.val')}")
        probe, scored, rule = Subset.all(index), everything, "probes train on data.probe, scored on data.val"
    elif len(train) == 1 and train[0].labelled and train[0].classes == val.classes:
        probe, scored, rule = Subset.all(train[0]), everything, "probes train on data.train, scored on data.val"
    else:
        rule = "probes train on 80 % of data.val, scored on the other 20 % (stratified, by hash of the key)"
        if len(train) == 1 and train[0].labelled:
            rule += f", since data.train {_difference(train[0].classes, val.classes, 'data.val')}"
        probe, scored = split_by_key(everything, 0.2)
    if data.probe_images is not None and data.probe_images < len(probe.samples):
        probe, rule = first_by_key(probe, data.probe_images), f"{rule}; training on {data.probe_images} images"
    return Sets(train, everything, rule, probe, scored)


def open_targets(objective: Objective, recipe: Recipe, sets: Sets, stream: Stream) -> None:
    """Open the cache of an objective's targets, if the recipe asks for one."""
    if objective.target_cache is None or stream.period is None:
        return
    data = recipe.data
    key = {
        "target": objective.target_facts(),
        "view": repr(objective.views(objective.encoder.img_size)),
        "pixels": [recipe.encoder.get("in_chans", 3), data.max_pixels],
        "data": sets.fingerprint,
        "order": [recipe.seed, data.num_lanes, data.window, data.weights, data.repeats, data.fixed_passes],
        "precision": recipe.mixed_precision,
    }
    objective.targets = TargetCache(Path(objective.target_cache), key, stream.period)
    logger.info("targets: %s, of %d views", objective.targets.path, stream.period)


def resolve_classes(recipe: Recipe, opened: dict[str, Index] | None = None) -> None:
    """An objective with ``num_classes`` learns the classes of ``data.train``; null becomes their number.

    Raises:
        InputError: training data without labels or with different classes, or other classes in ``data.val``.
    """
    data, stated = recipe.data, recipe.objective
    if "num_classes" not in stated:
        if "accuracy" in recipe.evals:
            raise InputError(f"evals.accuracy: objective.name={stated['name']!r} predicts no classes; leave it out")
        return
    sources = {f"data.train={spec}": open_data(data, spec, opened) for spec in train_specs(data)}
    first = next(iter(sources.values()))
    if data.val is not None and {"accuracy", "heads"} & set(recipe.evals):
        sources[f"data.val={data.val}"] = open_data(data, data.val, opened)
    for name, index in sources.items():
        missing = int((index.samples["label"] < 0).sum())
        if missing:
            raise InputError(
                f"{name}: {missing} of {len(index)} images have no label, and objective.name={stated['name']!r} learns "
                "from labels; give class folders (a folder a class), or labelled shards"
            )
        if index.classes != first.classes:
            raise InputError(f"{name}: {_difference(index.classes, first.classes, 'data.train')}")
    count = max(len(index.classes or ()) or int(index.samples["label"].max()) + 1 for index in sources.values())
    if stated["num_classes"] is None:
        stated["num_classes"] = count
        logger.info("objective.num_classes: %d, the classes of data.train", count)
    elif stated["num_classes"] < count:
        raise InputError(f"objective.num_classes={stated['num_classes']}: data.train has {count}; give that, or null")


def _difference(classes: list[str] | None, others: list[str] | None, of: str) -> str:
    """How two lists of class names differ, for a message about the first."""
    ours, theirs = classes or [], others or []
    if not ours or not theirs:
        return f"{'has' if ours else 'lacks'} class names, {of} {'has' if theirs else 'lacks'} them; pack both alike"
    lacks, more = [n for n in theirs if n not in ours], [n for n in ours if n not in theirs]
    parts = [f"lacks classes of {of}: {_few(lacks)}"] if lacks else []
    parts += [f"has classes that {of} lacks: {_few(more)}"] if more else []
    return "; ".join(parts) or f"has the classes of {of} in another order: {_few(ours)}; there: {_few(theirs)}"


def _few(names: list[str] | None) -> str:
    names = names or []
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def resolve_precision(recipe: AnyRecipe) -> str:
    """``auto`` becomes bf16 on a GPU that computes in it, else no."""
    if recipe.mixed_precision == "auto":
        recipe.mixed_precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return recipe.mixed_precision


def build_evaluations(evals: dict[str, Any], labelled: bool) -> dict[str, Evaluation]:
    """The evaluations of a recipe by name; those that need labels are left out, and named, where there are none."""
    built = {}
    for name, values in evals.items():
        cls, arguments = evaluation_class(name), {key: value for key, value in values.items() if key != "every"}
        built[name] = constructed(f"evals.{name}", lambda cls=cls, arguments=arguments: cls(**arguments))
    for name in [name for name, evaluation in built.items() if evaluation.labelled and not labelled]:
        logger.info("%s: left out, it needs labelled images (data.val)", name)
        del built[name]
    return built


def loader_workers(run: RunSection) -> int:
    """Loader processes a device: as the recipe says, else the cores of this process shared by those of this machine."""
    if run.workers is not None:
        return run.workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(len(os.sched_getaffinity(0)) // local, MOST_WORKERS))
