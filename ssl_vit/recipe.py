"""A recipe: everything that decides a run, composed from its sections and checked before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from ssl_vit.config import (
    Duration,
    DurationField,
    InputError,
    Section,
    check,
    import_part,
    plain,
    signature_section,
)
from ssl_vit.training.optim import OptimSection

Sources = str | list[str]
Precision = Annotated[Literal["bf16", "no", "auto"], BeforeValidator(lambda value: "no" if value is False else value)]
"""YAML reads a bare ``no`` as false."""

FILLED = ("encoder", "mean", "std")
"""Arguments of an objective's constructor that the program fills: the last two from the data section."""


class DataSection(Section):
    """What is trained on and judged on, and how bytes become numbers.

    Args:
        train: training images: folder of shards, range or glob of tars, URL of a folder or range (http, https, s3,
            gs, hf), folder:PATH, hf:NAME, builtin:digits-train; a list mixes several
        weights: shares of several sources; default: their sizes
        val: labelled images that evaluations score; without it only label-free measures
        probe: labelled images that evaluations train on; default: train if it has val's classes, else 80 % of
            val
        probe_images: evaluations train on so many images of data.probe only, chosen by hash of the key
        labels: none: ignore the class folders of folder: and hf: sources
        mean: per channel, of pixels in [0, 1]; default: ImageNet's, or the initial encoder's
        std: per channel; default as mean
        crop_pct: evaluation: share of the shorter side kept by the centre crop; default 0.875 or the initial
            encoder's
        interpolation: evaluation: resize filter; default bicubic or the initial encoder's
        num_lanes: parallel sequences of the sample order
        window: samples of a lane that are shuffled together
        repeats: views of each sample in a row (repeated augmentation)
        fixed_passes: after so many passes the same samples come again in the same views and order, so that
            objective.target_cache can keep what a teacher or tokenizer said of them; default: views never recur
        bad_samples: an image that does not decode: replace, count and name it, or stop
        max_bad_fraction: stop when more than this share of the samples is bad
        max_pixels: larger images are bad samples
        limit: train on so many images of each source only: of each class its share, at even distances
        cache: folder for packed sources and remote shards; default $SSL_VIT_CACHE or ~/.cache/ssl_vit
        cache_size: GB that remote shards may take there; default: all of them; 0: none, a request for each image
    """

    train: Sources | None = None
    weights: list[float] | None = None
    val: str | None = None
    probe: str | None = None
    probe_images: int | None = Field(default=None, ge=2)
    labels: Literal["auto", "none"] = "auto"
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    interpolation: Literal["bicubic", "bilinear"] | None = None
    num_lanes: int = Field(default=64, ge=1)
    window: int = Field(default=4096, ge=1)
    repeats: int = Field(default=1, ge=1)
    fixed_passes: int | None = Field(default=None, ge=1)
    bad_samples: Literal["skip", "stop"] = "skip"
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    max_pixels: int = Field(default=178_956_970, ge=1)
    limit: int | None = Field(default=None, ge=1)
    cache: str | None = None
    cache_size: float | None = Field(default=None, ge=0)


class RunSection(Section):
    """Where and how a run goes on; nothing here changes results beyond the stated levels of exactness.

    Args:
        dir: folder of the run
        workers: loader processes a device; default: the cores of this process, at most 16
        stall_timeout: seconds without a batch after which the run prints what its workers do, saves and stops
        micro_batch_size: images a device and forward pass; default: batch_size / devices
        eval_batch_size: images a device and forward pass in evaluations
        log_every: steps between two lines in metrics.jsonl
        save_every: time between two checkpoints
        keep_last: checkpoints kept
        keep_every: checkpoints at multiples of this are never deleted
        keep_best: a measured number, e.g. knn/top1; the checkpoint with its highest value is saved and never deleted
        tensorboard: write RUN/tensorboard
        compile: compile each transformer block for training; losses equal to 1e-5 in float32, the start takes longer
        deterministic: deterministic kernels, for bit-for-bit resume on a GPU
        log_samples: write the names of the samples of each step into RUN/samples/, one file a process
    """

    dir: str = "runs/default"
    workers: int | None = Field(default=None, ge=0)
    stall_timeout: float = Field(default=1800, gt=0)
    micro_batch_size: int | None = Field(default=None, ge=1)
    eval_batch_size: int = Field(default=256, ge=1)
    log_every: int = Field(default=20, ge=1)
    save_every: DurationField = Duration(1, "epochs")
    keep_last: int = Field(default=2, ge=1)
    keep_every: DurationField | None = None
    keep_best: str | None = None
    tensorboard: bool = True
    compile: bool = False
    deterministic: bool = False
    log_samples: bool = False


class Recipe(Section):
    """A training run: ``objective`` and ``encoder`` are checked against the constructors they name.

    Args:
        seed: of everything random
        mixed_precision: auto: bf16 on a GPU that has it, else no
        objective: name and constructor arguments; init: a file to fill it from
        encoder: timm name and constructor arguments; init: a run, export or file to fill it from, or timm:NAME
        evals: evaluations by name, with 'every' and constructor arguments
    """

    seed: int = Field(default=0, ge=0)
    mixed_precision: Precision = "auto"
    objective: dict[str, Any]
    encoder: dict[str, Any]
    data: DataSection = Field(default_factory=lambda: DataSection())
    optim: OptimSection = Field(default_factory=lambda: OptimSection())
    evals: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    run: RunSection = Field(default_factory=lambda: RunSection())


class EvaluationRecipe(Section):
    """A measurement of an encoder that is not trained further.

    Args:
        seed: of everything random
        mixed_precision: auto: bf16 on a GPU that has it, else no
        encoder: init: a run, checkpoint, export or file; or a timm name and arguments
        evals: evaluations by name, with constructor arguments
    """

    seed: int = Field(default=0, ge=0)
    mixed_precision: Precision = "auto"
    encoder: dict[str, Any]
    data: DataSection = Field(default_factory=lambda: DataSection())
    evals: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    run: RunSection = Field(default_factory=lambda: RunSection())


class EmbedSection(Section):
    """What is written of each image.

    Args:
        format: parquet: key, label and feature; npy: features, and a jsonl file of keys and labels beside it
        pool: pool: the encoder's own feature; token: class token; avg: mean of the patches; both: side by side
        stages: blocks whose features stand side by side, from 1, or from -1 backwards
    """

    format: Literal["parquet", "npy"] = "parquet"
    pool: str = "pool"
    stages: list[int] = Field(default_factory=lambda: [-1])


class EmbeddingRecipe(Section):
    """Features of every image of data.train.

    Args:
        seed: of an encoder without init
        mixed_precision: auto: bf16 on a GPU that has it, else no
        encoder: init: a run, checkpoint, export or file; or a timm name and arguments
    """

    seed: int = Field(default=0, ge=0)
    mixed_precision: Precision = "auto"
    encoder: dict[str, Any]
    data: DataSection = Field(default_factory=lambda: DataSection())
    embed: EmbedSection = Field(default_factory=lambda: EmbedSection())
    run: RunSection = Field(default_factory=lambda: RunSection())


class SetSection(Section):
    """A labelled set.

    Args:
        name: in the table, and of its folder
        group: sets whose mean is given too
        train: images that evaluations train on
        val: images that are scored
        hf: data set on the Hugging Face Hub that it comes from, said where it is not at hand
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    group: str = "sets"
    train: str
    val: str
    hf: str | None = None


class TransferRecipe(EvaluationRecipe):
    """A measurement of an encoder on many labelled sets.

    Args:
        seed: of everything random
        mixed_precision: auto: bf16 on a GPU that has it, else no
        encoder: init: a run, checkpoint, export or file; or a timm name and arguments
        evals: evaluations by name, with constructor arguments
        sets: name, group, train, val of each set
        train_images: evaluations train on so many images of each set; 1000 with evals.sweep is VTAB's 800 and
            200 to choose on; null: all
        missing: a set that is not at hand: skip it and say so in the table, or stop before anything is measured
    """

    sets: list[SetSection] = Field(default_factory=list)
    train_images: int | None = Field(default=None, ge=2)
    missing: Literal["stop", "skip"] = "stop"


AnyRecipe = Recipe | EvaluationRecipe | EmbeddingRecipe


def objective_class(recipe: Recipe) -> type:
    """The class that ``objective.name`` names."""
    name = recipe.objective.get("name")
    return import_part("ssl_vit.objectives", str(name), "objective.name", "Objective")


def evaluation_class(name: str) -> type:
    """The class of the evaluation ``name``."""
    return import_part("ssl_vit.evaluation", name, "evals", "Evaluation")


def encoder_class(encoder: Mapping[str, Any]) -> type:
    """The class that builds the timm model ``encoder.name``."""
    from ssl_vit.encoders.base import encoder_class_of

    return encoder_class_of(str(encoder["name"]))


def open_section(cls: type, values: Mapping[str, Any], where: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check a section against its constructor's signature and return it with all defaults filled in.

    Raises:
        InputError: an unknown key or a wrong type.
    """
    section = check(signature_section(cls, skip), values, where)
    return {name: getattr(section, name) for name in type(section).model_fields}


RecipeT = TypeVar("RecipeT", bound=AnyRecipe)


def check_recipe(recipe: RecipeT) -> RecipeT:
    """Check the open sections and what only two sections together decide; the recipe comes back complete.

    Raises:
        InputError: naming the key, its value, what is allowed and the nearest known key.
    """
    if not isinstance(recipe, EmbeddingRecipe):
        recipe.evals = {
            name: _complete_evaluation(name, values) for name, values in recipe.evals.items() if values is not None
        }
    recipe.encoder = _complete_encoder(recipe.encoder)
    if isinstance(recipe, Recipe):
        values = {key: value for key, value in recipe.objective.items() if key not in ("name", "init")}
        filled = open_section(objective_class(recipe), values, "objective", skip=FILLED)
        recipe.objective = {"name": recipe.objective["name"], **filled, "init": recipe.objective.get("init")}
        if not recipe.data.train:
            raise InputError("data.train: is required; give it as data.train=folder:/my/images or a folder of shards")
        if recipe.objective.get("target_cache") and not recipe.data.fixed_passes:
            raise InputError(
                f"objective.target_cache={recipe.objective['target_cache']!r}: needs data.fixed_passes=K: without it "
                "no view comes twice, and targets of one crop are not those of another; give K, or leave the cache out"
            )
        micro_batch(recipe.optim.batch_size, recipe.run.micro_batch_size, 1)
        _above_zero("run.save_every", recipe.run.save_every)
        _above_zero("run.keep_every", recipe.run.keep_every)
        if recipe.run.keep_best is not None and recipe.run.keep_best.partition("/")[0] not in recipe.evals:
            allowed = ", ".join(recipe.evals) or "none are in this recipe"
            raise InputError(
                f"run.keep_best={recipe.run.keep_best!r}: allowed: numbers of evals: {allowed}; e.g. knn/top1"
            )
    if isinstance(recipe, TransferRecipe):
        names = [row.name for row in recipe.sets]
        if not names or len(set(names)) < len(names):
            raise InputError(f"sets={names}: at least one is needed, each with a name of its own")
    chans = recipe.encoder.get("in_chans", 3)
    for key in ("mean", "std"):
        numbers = getattr(recipe.data, key)
        if numbers is not None and len(numbers) != chans:
            raise InputError(f"data.{key}={numbers}: should have one number a channel, and encoder.in_chans={chans}")
    if recipe.data.std is not None and min(recipe.data.std) <= 0:
        raise InputError(f"data.std={recipe.data.std}: should be above 0")
    return recipe


def completer(recipe: AnyRecipe) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that gives a saved recipe of this kind the keys that came later, at their defaults."""

    def complete(saved: dict[str, Any]) -> dict[str, Any]:
        try:
            return plain(check_recipe(check(type(recipe), saved)))
        except InputError:  # it has keys that are gone: the comparison names them
            return saved

    return complete


def _above_zero(key: str, period: Duration | None) -> None:
    if period is not None and period.value <= 0:
        raise InputError(f"{key}={period}: should be above 0, e.g. 1 (an epoch) or '500 steps'")


def _complete_evaluation(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's section with defaults; ``every`` is the loop's, the rest its constructor's."""
    rest = dict(values)
    every = rest.pop("every", None)
    if every is not None:
        try:
            every = Duration.parse(every)
        except ValueError as error:
            raise InputError(f"evals.{name}.every={every!r}: {error}") from None
        _above_zero(f"evals.{name}.every", every)
    return {"every": every, **open_section(evaluation_class(name), rest, f"evals.{name}")}


def _complete_encoder(values: dict[str, Any]) -> dict[str, Any]:
    """An encoder section with defaults; with ``init`` and no name, what the file says of itself."""
    init = values.get("init")
    if "name" not in values:
        if not init:
            raise InputError("encoder.name: is required, e.g. encoder.name=vit_base_patch16_224 (or give encoder.init)")
        from ssl_vit.encoders.weights import encoder_config

        stated = {key: value for key, value in encoder_config(init).items() if key != "data"}
        values = {**stated, **values}
    try:
        cls = encoder_class(values)
    except ValueError as error:
        raise InputError(f"encoder.name={values['name']!r}: {error}") from None
    filled = open_section(cls, {key: value for key, value in values.items() if key != "init"}, "encoder")
    return {**filled, "init": init}


def micro_batch(batch_size: int, micro_batch_size: int | None, num_ranks: int) -> int:
    """The micro-batch; it, times the processes, divides the global batch."""
    if micro_batch_size is None:
        if batch_size % num_ranks:
            raise InputError(
                f"optim.batch_size={batch_size}: should be a multiple of the {num_ranks} processes; "
                f"nearest: {_nearest_multiple(batch_size, num_ranks)}"
            )
        return batch_size // num_ranks
    unit = micro_batch_size * num_ranks
    if batch_size % unit:
        raise InputError(
            f"optim.batch_size={batch_size}: should be a multiple of run.micro_batch_size={micro_batch_size} times "
            f"{num_ranks} process{'es' if num_ranks > 1 else ''}; nearest: {_nearest_multiple(batch_size, unit)}"
        )
    return micro_batch_size


def _nearest_multiple(value: int, unit: int) -> int:
    return max(round(value / unit), 1) * unit
