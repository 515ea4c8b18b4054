"""From the sections of a recipe to objects; what a constructor refuses becomes the user's one clear message."""

from __future__ import annotations

import contextlib
import inspect
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssl_vit.config import InputError, check, load, plain
from ssl_vit.data.bad_samples import BadSamples
from ssl_vit.data.loader import Pixels, View
from ssl_vit.data.order import Stream, derive_seed
from ssl_vit.data.reading_plan import ReadingPlan, view_bytes
from ssl_vit.data.views import CentreView
from ssl_vit.data.worker_count import cores_of_a_process, local_ranks
from ssl_vit.encoders.base import Encoder, create_encoder
from ssl_vit.encoders.files import run_of_checkpoint
from ssl_vit.encoders.timm_models import usual_pixels
from ssl_vit.encoders.weights import encoder_config, fill_encoder, fill_objective
from ssl_vit.evaluation.base import Evaluation, Subset
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
    check_recipe,
    evaluation_class,
    objective_class,
)
from ssl_vit.splits import Sets
from ssl_vit.training.metrics import truncate_metrics
from ssl_vit.training.plan import Plan

logger = logging.getLogger(__name__)

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


def _fill_from_init(objective: Objective, section: dict[str, Any]) -> None:
    if not section.get("init"):
        return
    report = fill_encoder(objective.encoder, Path(section["init"]))
    logger.info("encoder.init: %s", report)
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    if report.loaded < report.total and not any("fc_norm" in name for name in trained):
        raise InputError(
            f"encoder.fc_norm=true: {section['init']} has no norm behind the pooling, and nothing here trains a new "
            "one; allowed: false"
        )


def build_objective(recipe: Recipe) -> Objective:
    """The objective at its published initialisation, then filled from ``encoder.init`` and ``objective.init``."""
    torch.manual_seed(recipe.seed)
    encoder = build_encoder(recipe.encoder)
    arguments = {key: value for key, value in recipe.objective.items() if key not in ("name", "init")}
    if recipe.encoder.get("init"):
        # drawn from the same numbers as the head that an encoder was trained with, an untrained head already classifies
        torch.manual_seed(derive_seed(recipe.seed, zlib.crc32(recipe.objective["name"].encode())))
    cls = objective_class(recipe)
    for key in set(FILLED[1:]) & set(inspect.signature(cls).parameters):
        if (numbers := getattr(recipe.data, key)) is not None:
            arguments[key] = tuple(numbers)
    objective = constructed("objective", lambda: cls(encoder, **arguments))
    _fill_from_init(objective, recipe.encoder)
    objective.encoder_filled()
    if recipe.objective.get("init"):
        logger.info("objective.init: %s", fill_objective(objective, Path(recipe.objective["init"])))
    return objective


def build_frozen(recipe: EvaluationRecipe | EmbeddingRecipe) -> Objective:
    """An encoder that is only measured: from ``encoder.init``, else at its architecture's initialisation."""
    torch.manual_seed(recipe.seed)
    objective = Objective(build_encoder(recipe.encoder)).requires_grad_(False).eval()
    _fill_from_init(objective, recipe.encoder)
    return objective


def build_judged(recipe: EvaluationRecipe) -> Objective:
    """As :func:`build_frozen`; of a run or its checkpoint the whole objective, where an evaluation asks for it."""
    more = any(evaluation_class(name).call for name in recipe.evals)
    of_run = _recipe_of_run(recipe.encoder.get("init")) if more else None
    if of_run is None:
        return build_frozen(recipe)
    of_run.data, of_run.encoder = recipe.data, {**recipe.encoder, "init": None}
    of_run.objective["init"] = recipe.encoder["init"]
    return build_objective(of_run).requires_grad_(False).eval()


def _recipe_of_run(init: str | None) -> Recipe | None:
    """What trained the run that a path names, or a checkpoint in it; None: it is of no training."""
    path = Path(init or "")
    for folder in (path, *run_of_checkpoint(path)):
        if init and (folder / "recipe.yaml").is_file():
            values = load([folder / "recipe.yaml"], [])
            return check_recipe(check(Recipe, values)) if "objective" in values else None
    return None


def stated_pixels(init: str | None) -> dict[str, Any]:
    """Preprocessing that the file of an initial encoder states; empty for a bare file of weights."""
    with contextlib.suppress(InputError):
        return encoder_config(init).get("data", {}) if init else {}
    return {}


def resolve_pixels(data: DataSection, encoder: dict[str, Any], init: str | None = None) -> Pixels:
    """Fill what the recipe leaves open: from the file of the initial weights, else the usual constants.

    Args:
        data: is filled.
        encoder: its ``init`` counts unless there is another.
        init: file of the whole objective (``objective.init``).
    """
    init, chans = init or encoder.get("init"), encoder.get("in_chans", 3)
    stated = stated_pixels(init)
    chosen: dict[str, Any] = {}
    assumed: list[str] = []
    for key, default in usual_pixels(encoder["name"] if init else None, chans).items():
        given = getattr(data, key)
        if given is not None and key in stated and plain(given) != plain(stated[key]):
            logger.warning(
                "data.%s=%s overrides %s, with which the initial encoder was trained", key, given, stated[key]
            )
        if init and given is None and key not in stated:
            assumed.append(f"data.{key}={plain(default)}")
        chosen[key] = given if given is not None else stated.get(key, default)
        setattr(data, key, plain(chosen[key]))
    if assumed:
        logger.info("%s does not say how its images were prepared; assumed: %s", init, " ".join(assumed))
    chosen["mean"], chosen["std"] = tuple(chosen["mean"]), tuple(chosen["std"])
    return Pixels(**chosen, in_chans=chans, max_pixels=data.max_pixels)


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


def reading_plan(
    recipe: Recipe, sets: Sets, stream: Stream, view: View, img_size: tuple[int, int], pixels: Pixels, plan: Plan,
    workers: int,
) -> ReadingPlan:  # fmt: skip
    """What reading takes: for training, and for evaluations beside it."""
    centre = CentreView(img_size, pixels.crop_pct, pixels.interpolation)
    evaluated = [part for part in (sets.images, sets.probe, sets.val) if part is not None and recipe.evals]
    return ReadingPlan(
        sets.train, stream, recipe.optim.batch_size, plan.micro_batch_size, plan.num_ranks, local_ranks(), workers,
        view_bytes(view, pixels.in_chans), [part.index for part in evaluated],
        max((len(part.samples) for part in evaluated), default=0), recipe.run.eval_batch_size,
        view_bytes(centre, pixels.in_chans), torch.cuda.is_available(),
    )  # fmt: skip


def bad_record(folder: Path, step: int, main: bool, max_fraction: float = 1.0, before: int = 0) -> BadSamples:
    """The record of samples that do not decode, without what comes again after a step."""
    path = folder / "bad_samples.jsonl"
    if main:
        truncate_metrics(path, step)
    return BadSamples(path, max_fraction, before, main)


def resolve_precision(recipe: AnyRecipe) -> str:
    """``auto`` becomes bf16 on a GPU that computes in it, else no."""
    if recipe.mixed_precision == "auto":
        recipe.mixed_precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return recipe.mixed_precision


def build_evaluations(
    evals: dict[str, Any], labelled: bool, probe: Subset | None = None, objective: Objective | None = None
) -> dict[str, Evaluation]:
    """The evaluations of a recipe by name; those that need labels are left out, and named, where there are none.

    Raises:
        InputError: an impossible argument, the labelled images ``probe`` are not enough for one, or ``objective`` has
            not what one asks for.
    """
    built = {}
    for name, values in evals.items():
        cls, arguments = evaluation_class(name), {key: value for key, value in values.items() if key != "every"}
        built[name] = constructed(f"evals.{name}", lambda cls=cls, arguments=arguments: cls(**arguments))
    for name in [name for name, evaluation in built.items() if evaluation.labelled and not labelled]:
        logger.info("%s: left out, it needs labelled images (data.val)", name)
        del built[name]
    for name, evaluation in built.items():
        evaluation.check(probe)
        if objective is not None and evaluation.call and not hasattr(objective, evaluation.call):
            alone = "an encoder alone; give a run or a checkpoint of it as encoder.init, or leave it out"
            what = alone if type(objective) is Objective else f"{type(objective).__name__}; leave it out"
            raise InputError(f"evals.{name}: asks for {evaluation.call!r}, which is not there in {what}")
    return built


def loader_workers(run: RunSection) -> int:
    """Loader processes a device: as the recipe says, else the cores of this process shared by those of this machine."""
    if run.workers is not None:
        return run.workers
    return min(cores_of_a_process(), MOST_WORKERS)
