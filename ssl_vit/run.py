"""The whole wiring: ``run(recipe)`` trains, judges and exports; ``evaluate(recipe)`` only judges."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration

from ssl_vit import build
from ssl_vit.config import InputError, plain, to_yaml
from ssl_vit.data.bad_samples import BadSamples
from ssl_vit.data.loader import Pixels, TrainBatches
from ssl_vit.encoders.base import Encoder
from ssl_vit.evaluation.base import Evaluation, Subject
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import EvaluationRecipe, Recipe, micro_batch
from ssl_vit.report import finish, report
from ssl_vit.training.checkpoint import Checkpoints, restore
from ssl_vit.training.metrics import MetricsLog
from ssl_vit.training.optim import build_optimizer
from ssl_vit.training.run_folder import RunFolder, library_versions
from ssl_vit.training.signals import StopRequest
from ssl_vit.training.trainer import Plan, Trainer

logger = logging.getLogger(__name__)


def run(recipe: Recipe, resume: str = "auto") -> None:
    """Train as the recipe says, evaluate on the way, export the encoder into the run's folder.

    Everything a user can have got wrong is found before a process group starts.
    """
    # what a user can have got wrong
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro = micro_batch(recipe.optim.batch_size, recipe.run.micro_batch_size, num_ranks)
    pixels = build.resolve_pixels(recipe.data, recipe.encoder)
    precision = build.resolve_precision(recipe)
    folder = RunFolder(recipe.run.dir)
    checkpoint = folder.resume_point(plain(recipe), resume)
    if folder.finished():
        logger.info("run.dir=%s: this run is finished; nothing to do", folder.path)
        return report(folder)
    objective = build.build_objective(recipe)
    sets = build.open_sets(recipe.data)
    stream = sets.stream(recipe)
    plan = Plan(recipe.optim, stream.epoch_size, micro, num_ranks)
    plan.check()
    evaluations = build.build_evaluations(recipe.evals, labelled=sets.val is not None)
    optimizer = build_optimizer(objective, recipe.optim)
    start_step = restore(checkpoint, objective, optimizer, sets.fingerprint) if checkpoint else 0
    workers = build.loader_workers(recipe.run)

    # processes, device, precision
    accelerator = open_accelerator(precision, num_ranks, recipe.run.deterministic)
    if accelerator.is_main_process:
        folder.open(recipe, {"num_processes": accelerator.num_processes, "micro_batch_size": micro, "workers": workers})
        folder.log_to_file()
        folder.status("running", start_step)
    announce(recipe, plan, sets, accelerator, start_step, workers, objective.level_c)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)

    # where numbers, pictures and checkpoints go
    # a run that starts over evaluates step 0 again, so that line must go too
    kept = start_step or -1
    log = MetricsLog(folder.path, kept, plan.total_steps, recipe.run.tensorboard, accelerator.is_main_process)
    log.config(to_yaml(recipe))
    bad = BadSamples(folder.path / "bad_samples.jsonl", recipe.data.max_bad_fraction)
    subject = subject_of(recipe, objective, wrapped, pixels, sets, accelerator.device, workers, log, bad)

    # train
    stop = StopRequest()
    trainer = Trainer(
        accelerator,
        wrapped,
        objective,
        optimizer,
        TrainBatches(
            sets.train, stream, objective.views(objective.encoder.img_size), pixels, recipe.seed,
            recipe.optim.batch_size, micro, accelerator.process_index, accelerator.num_processes,
            recipe.data.bad_samples,
        ),
        pixels,
        plan,
        recipe.seed,
        log,
        Checkpoints(folder.checkpoints, recipe.run.keep_last, plan.ends(recipe.run.keep_every)),
        evaluate=evaluate_when_due(recipe, evaluations, plan, subject, log),
        on_bad=bad,
        stop=stop,
        start_step=start_step,
        save_due=plan.ends(recipe.run.save_every),
        log_every=recipe.run.log_every,
        workers=workers,
        state={"data": sets.fingerprint},
    )  # fmt: skip
    with stop:
        trainer.fit()
    log.close()

    # hand over
    if accelerator.is_main_process:
        finish(recipe, folder, objective, pixels, plan, sets.rule, bad.count)
        folder.close_log()


def evaluate(recipe: EvaluationRecipe, resume: str = "auto") -> None:
    """Measure an encoder as it is: all of ``evals`` once, into the run's folder."""
    folder = RunFolder(recipe.run.dir)
    pixels = build.resolve_pixels(recipe.data, recipe.encoder)
    precision = build.resolve_precision(recipe)
    folder.resume_point(plain(recipe), resume)
    if folder.finished():
        logger.info("run.dir=%s: this evaluation is finished; nothing to do", folder.path)
        return report(folder)
    objective = build.build_frozen(recipe)
    sets = build.open_sets(recipe.data)
    evaluations = build.build_evaluations(recipe.evals, labelled=sets.val is not None)
    workers = build.loader_workers(recipe.run)
    accelerator = open_accelerator(precision, int(os.environ.get("WORLD_SIZE", "1")), recipe.run.deterministic)
    main = accelerator.is_main_process
    if main:
        folder.open(recipe, {"num_processes": accelerator.num_processes})
        folder.log_to_file()
        folder.status("running")
    objective.to(accelerator.device)
    log = MetricsLog(folder.path, -1, 0, recipe.run.tensorboard, main)
    bad = BadSamples(folder.path / "bad_samples.jsonl", 1.0)
    subject = subject_of(recipe, objective, objective, pixels, sets, accelerator.device, workers, log, bad)
    with accelerator.autocast():
        results = measure(subject, evaluations)
    log.evaluation(0, results)
    log.close()
    if main:
        folder.write_json(
            "result.json", {"evaluations": {"final": results}, "probe": sets.rule, "bad_samples": bad.count}
        )
        folder.status("finished", exit_code=0)
        report(folder)
        folder.close_log()


# --------------------------------------------------------------------------------------------- pieces


def open_accelerator(precision: str, num_ranks: int, deterministic: bool) -> Accelerator:
    """Accelerate's view of processes and precision; the loader stays ours.

    Raises:
        InputError: accelerate joined another number of processes than the launcher started.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(deterministic)
    config = DataLoaderConfiguration(dispatch_batches=False)
    accelerator = Accelerator(mixed_precision=precision, dataloader_config=config, step_scheduler_with_optimizer=False)
    if accelerator.num_processes != num_ranks:
        raise InputError(
            f"the launcher started {num_ranks} processes, but each trains as one of {accelerator.num_processes}; "
            "on CPUs set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def subject_of(
    recipe: Recipe | EvaluationRecipe,
    objective: Objective,
    wrapped: torch.nn.Module,
    pixels: Pixels,
    sets: build.Sets,
    device: torch.device,
    workers: int,
    log: MetricsLog,
    bad: BadSamples,
) -> Subject:
    """What evaluations judge, its pictures going to the log and its bad samples to their file."""
    encoder: Encoder = objective.encoder
    subject = Subject(
        wrapped, encoder.pool, encoder.img_size, pixels, device, sets.images, sets.probe, sets.val,
        seed=recipe.seed, batch_size=recipe.run.eval_batch_size, workers=workers, on_bad=bad,
    )  # fmt: skip
    subject.picture = lambda name, image: log.picture(subject.step, name, image)
    return subject


def evaluate_when_due(
    recipe: Recipe, evaluations: dict[str, Evaluation], plan: Plan, subject: Subject, log: MetricsLog
) -> Callable[[int], None]:
    """A function of the steps done: every evaluation at the start, at the end and at multiples of its ``every``."""
    ends = {name: plan.ends((recipe.evals[name] or {}).get("every")) for name in evaluations}

    def evaluate_at(step: int) -> None:
        due = {name: e for name, e in evaluations.items() if step in (0, plan.total_steps) or ends[name](step)}
        if due:
            log.evaluation(step, measure(subject.at(step), due))

    return evaluate_at


def measure(subject: Subject, evaluations: dict[str, Evaluation]) -> dict[str, float]:
    """All numbers of some evaluations, named ``evaluation/number``, with the seconds each took."""
    results: dict[str, float] = {}
    for name, evaluation in evaluations.items():
        start = time.monotonic()
        results |= {f"{name}/{key}": value for key, value in evaluation(subject).items()}
        results[f"{name}/seconds"] = round(time.monotonic() - start, 3)
    return results


def announce(
    recipe: Recipe,
    plan: Plan,
    sets: build.Sets,
    accelerator: Accelerator,
    start_step: int,
    workers: int,
    level_c: tuple[str, ...],
) -> None:
    """The lines a person checks before walking away."""
    if not accelerator.is_main_process:
        return
    versions = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    logger.info("versions: %s", versions)
    images = ", ".join(f"{len(index)} images in {len(index.shards)} shards" for index in sets.train)
    logger.info("data: %s; an epoch is %d", images, plan.epoch_size)
    logger.info("evaluation: %s", sets.rule)
    logger.info(
        "processes: %d (%s) on %s, precision %s, loader workers %d a process",
        accelerator.num_processes,
        accelerator.distributed_type.value,
        accelerator.device,
        accelerator.mixed_precision,
        workers,
    )
    logger.info("%s", plan.describe())
    loose = [key for key in level_c if _value_at(recipe, key)]
    loose += ["mixed_precision"] if accelerator.mixed_precision != "no" else []
    other = f"equal in distribution ({', '.join(loose)})" if loose else "equal to 1e-5"
    logger.info(
        "exactness: a resume is bit for bit with this code, machine, processes, micro-batch and threads, whatever the "
        "loader workers; with other processes or micro-batches the batches, views and masks are the same, losses %s",
        other,
    )
    if start_step:
        logger.info("resumed after step %d of %d", start_step, plan.total_steps)


def _value_at(recipe: Recipe, key: str) -> Any:
    value: Any = plain(recipe)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
