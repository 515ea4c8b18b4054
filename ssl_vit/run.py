"""The whole wiring: ``run(recipe)`` trains, judges and exports; ``evaluate(recipe)`` only judges."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ssl_vit import build, distributed, splits
from ssl_vit.config import plain, to_yaml
from ssl_vit.cost import peak_rate
from ssl_vit.data.bad_samples import BadSamples
from ssl_vit.data.loader import Pixels, TrainBatches
from ssl_vit.data.reading_plan import ReadingPlan
from ssl_vit.data.worker_count import worker_rate
from ssl_vit.encoders.base import Encoder
from ssl_vit.evaluation.base import Evaluation, Subject
from ssl_vit.html_report import write_report
from ssl_vit.recipe import EvaluationRecipe, Recipe, completer, micro_batch
from ssl_vit.report import finish, measurement, report
from ssl_vit.training.checkpoint import Checkpoints, read_checkpoint
from ssl_vit.training.environment import library_versions
from ssl_vit.training.launch import KINDS, Launch
from ssl_vit.training.metrics import MetricsLog, truncate_metrics
from ssl_vit.training.plan import Plan
from ssl_vit.training.run_folder import RunFolder
from ssl_vit.training.signals import Interrupted, Preempted, StopRequest
from ssl_vit.training.skips import Skips
from ssl_vit.training.strategies import compile_blocks, forward_in_precision
from ssl_vit.training.trainer import Trainer

logger = logging.getLogger(__name__)


def run(recipe: Recipe, resume: str = "auto") -> None:
    """Train as the recipe says, evaluate on the way, export the encoder into the run's folder.

    Everything a user can have got wrong is found before a process group starts.
    """
    with StopRequest() as stop:
        # what a user can have got wrong
        launch = Launch.asked_for()
        micro = micro_batch(recipe.optim.batch_size, recipe.run.micro_batch_size, launch.num_ranks)
        pixels = build.resolve_pixels(recipe.data, recipe.encoder, recipe.objective.get("init"))
        precision = build.resolve_precision(recipe)
        splits.resolve_classes(recipe, opened := {})
        deepspeed = launch.deepspeed_config(precision, recipe.optim, micro) if launch.kind == "zero" else None
        folder = RunFolder(recipe.run.dir)
        folder.check_resume(plain(recipe), resume, completer(recipe))
        if folder.finished():
            logger.info("run.dir=%s: this run is finished; nothing to do", folder.path)
            return report(folder)
        objective = build.build_objective(recipe)
        launch.check(objective, recipe.optim.clip_mode, recipe.optim.name)
        sets = splits.open_sets(recipe.data, opened)
        stream = sets.stream(recipe)
        build.open_targets(objective, recipe, sets, stream)
        plan = Plan(recipe.optim, stream.epoch_size, micro, launch.num_ranks)
        plan.check()
        workers = build.loader_workers(recipe.run)
        views = objective.views(objective.encoder.img_size)
        reading = build.reading_plan(recipe, sets, stream, views, objective.encoder.img_size, pixels, plan, workers)
        reading.check()
        evaluations = build.build_evaluations(recipe.evals, sets.val is not None, sets.probe, objective)
        folder.lock()
        saved = folder.restore(resume, objective, sets.fingerprint)
        state: dict[str, Any] = saved.state if saved else {"data": sets.fingerprint}
        start_step = saved.step if saved else 0

        # processes, device, precision
        accelerator = launch.open(precision, recipe.run.deterministic, deepspeed)
        main = accelerator.is_main_process
        if main:
            folder.open(recipe, {**launch.facts(), "micro_batch_size": micro, "workers": workers})
            folder.log_to_file()
            folder.status("running", start_step)
        batches = TrainBatches(
            sets.train, stream, views, pixels, recipe.seed, recipe.optim.batch_size, micro,
            accelerator.process_index, accelerator.num_processes, recipe.data.bad_samples,
        )  # fmt: skip
        announce(recipe, plan, reading, batches, sets, accelerator, launch, start_step, objective.level_c)
        most = peak_rate(recipe, accelerator.device) if main else None
        if recipe.run.compile:
            compile_blocks(objective)
        strategy = KINDS[launch.kind](accelerator, objective, recipe.optim, plan.accumulation)
        if saved:
            strategy.load(None, saved.optimizer)
        encoder = objective.encoder

        # where numbers, pictures and checkpoints go
        # a run that starts over evaluates step 0 again, so that line must go too
        kept = start_step if state.get("evaluated") or start_step else -1
        log = MetricsLog(folder.path, kept, plan.total_steps, recipe.run.tensorboard, main)
        log.config(to_yaml(recipe))
        bad = build.bad_record(folder.path, start_step, main, recipe.data.max_bad_fraction, state.get("bad_samples", 0))
        subject = subject_of(recipe, encoder, strategy.wrapped, pixels, sets, accelerator.device, workers, log, bad)
        subject.pause_point = lambda: stop.check(accelerator.device)
        subject.on_no_data = stop.no_data
        skips = Skips(
            folder.path / "bad_batches.jsonl", recipe.optim.max_skips, batches.names_of_step,
            state.get("skipped", []), set(state.get("barred", [])), main,
        )  # fmt: skip
        if main:
            truncate_metrics(skips.path, start_step)

        # train
        always = plan.ends(recipe.run.keep_every)
        evaluate, due = evaluate_when_due(recipe, evaluations, plan, subject, log)
        trainer = Trainer(
            strategy, batches, pixels, plan, recipe.seed, log,
            Checkpoints(
                folder.checkpoints, recipe.run.keep_last, lambda s: always(s) or s == state.get("best", {}).get("step")
            ),
            evaluate=evaluate, evaluation_due=due, evaluated=state.get("evaluated", False), bad=bad, stop=stop,
            state=state, skips=skips, start_step=start_step, save_due=plan.ends(recipe.run.save_every),
            log_every=recipe.run.log_every, workers=workers, keep_best=recipe.run.keep_best,
            stall_timeout=recipe.run.stall_timeout, peak_rate=most,
            on_samples=sample_log(folder.path / "samples", batches, start_step) if recipe.run.log_samples else None,
        )  # fmt: skip
        stop.waits = True
        trainer.fit()
        stop.waits, stop.step = False, plan.total_steps
        log.close()

        # hand over
        if main:
            if strategy.gathers:  # parts cannot be exported: what was saved can
                objective = build.build_objective(recipe)
                read_checkpoint(trainer.checkpoints.path(plan.total_steps)).fill(
                    objective, folder.path, sets.fingerprint
                )
            facts = measurement(recipe, sets, objective.encoder, evaluations, state.get("bad_samples", 0))
            facts["bad_samples_left_out"] = len(bad.evaluated)
            finish(recipe, folder, objective, pixels, plan, facts)
            folder.close_log()


def evaluate(recipe: EvaluationRecipe, resume: str = "auto") -> None:
    """Measure an encoder as it is: all of ``evals`` once, into the run's folder."""
    with StopRequest() as stop:
        launch = Launch.asked_for().replicated()
        folder = RunFolder(recipe.run.dir)
        pixels = build.resolve_pixels(recipe.data, recipe.encoder)
        precision = build.resolve_precision(recipe)
        folder.check_resume(plain(recipe), resume, completer(recipe))
        if folder.finished():
            logger.info("run.dir=%s: this evaluation is finished; nothing to do", folder.path)
            return report(folder)
        objective = build.build_judged(recipe)
        sets = splits.open_sets(recipe.data)
        evaluations = build.build_evaluations(recipe.evals, sets.val is not None, sets.probe, objective)
        workers = build.loader_workers(recipe.run)
        folder.lock()
        accelerator = launch.open(precision, recipe.run.deterministic)
        main = accelerator.is_main_process
        if main:
            folder.open(recipe, launch.facts())
            folder.log_to_file()
            folder.status("running")
        encoder = objective.to(accelerator.device).encoder
        forward_in_precision(objective, accelerator)
        log = MetricsLog(folder.path, -1, 0, recipe.run.tensorboard, main)
        bad = build.bad_record(folder.path, 0, main)
        subject = subject_of(recipe, encoder, objective, pixels, sets, accelerator.device, workers, log, bad)
        subject.pause_point = lambda: stop.check(accelerator.device)
        subject.on_no_data = stop.no_data
        stop.waits = True
        try:
            results = measure(subject, evaluations)
        except Interrupted:
            raise Preempted(0, None, stop.name()) from None
        log.evaluation(0, results)
        log.close()
        if main:
            facts = measurement(recipe, sets, encoder, evaluations, len(bad.evaluated))
            folder.write_json("result.json", {"evaluations": {"final": results}, **facts})
            folder.status("finished", exit_code=0)
            write_report(folder.path)
            report(folder)
            folder.close_log()


# --------------------------------------------------------------------------------------------- pieces


def sample_log(folder: Path, batches: TrainBatches, start_step: int) -> Callable[[int, list[int]], None]:
    """A function that writes the names of the samples of each step, one file a process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{batches.rank}.jsonl"
    truncate_metrics(path, start_step)

    def write(step: int, positions: list[int]) -> None:
        with open(path, "a", encoding="utf-8") as file:
            line = {"step": step, "positions": positions, "samples": batches.names(positions)}
            file.write(json.dumps(line) + "\n")

    return write


def subject_of(
    recipe: Recipe | EvaluationRecipe,
    encoder: Encoder,
    wrapped: torch.nn.Module,
    pixels: Pixels,
    sets: splits.Sets,
    device: torch.device,
    workers: int,
    log: MetricsLog,
    bad: BadSamples,
) -> Subject:
    """What evaluations judge, its pictures going to the log and its bad samples to their file."""
    subject = Subject(
        wrapped, encoder.pool, encoder.img_size, pixels, device, sets.images, sets.probe, sets.val, seed=recipe.seed,
        batch_size=recipe.run.eval_batch_size, workers=workers, stall_timeout=recipe.run.stall_timeout,
    )  # fmt: skip
    subject.picture = lambda name, image: log.picture(subject.step, name, image)
    subject.on_bad = lambda reports: bad.left_out(reports, subject.step)
    return subject


def evaluate_when_due(
    recipe: Recipe, evaluations: dict[str, Evaluation], plan: Plan, subject: Subject, log: MetricsLog
) -> tuple[Callable[[int], dict[str, float]], Callable[[int], bool]]:
    """Functions of the steps done: one measures, at the start, the end and multiples of ``every``, one says when."""
    ends = {name: plan.ends((recipe.evals[name] or {}).get("every")) for name in evaluations}

    def due(step: int) -> list[str]:
        return [name for name in evaluations if step in (0, plan.total_steps) or ends[name](step)]

    def evaluate_at(step: int) -> dict[str, float]:
        chosen = {name: evaluations[name] for name in due(step)}
        results = measure(subject.at(step), chosen) if chosen else {}
        log.evaluation(step, results)
        return results

    return evaluate_at, lambda step: bool(due(step))


def measure(subject: Subject, evaluations: dict[str, Evaluation]) -> dict[str, float]:
    """All numbers of some evaluations, named ``evaluation/number``, with the seconds each took."""
    results: dict[str, float] = {}
    with torch.compiler.set_stance("force_eager"):  # blocks are compiled for the shapes of training only
        for name, evaluation in evaluations.items():
            subject.pause_point()
            start = time.monotonic()
            found = evaluation(subject)
            found["seconds"] = round(time.monotonic() - start, 3)
            if distributed.is_main():  # at once: the next one may take an hour
                text = "  ".join(f"{key} {value:.4f}" for key, value in found.items())
                logger.info("step %d  %s: %s", subject.step, name, text)
            results |= {f"{name}/{key}": value for key, value in found.items()}
    return results


def announce(
    recipe: Recipe,
    plan: Plan,
    reading: ReadingPlan,
    batches: TrainBatches,
    sets: splits.Sets,
    accelerator: Accelerator,
    launch: Launch,
    start_step: int,
    level_c: tuple[str, ...],
) -> None:
    """The lines a person checks before walking away."""
    if not accelerator.is_main_process:
        return
    versions = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    logger.info("versions: %s", versions)
    images = ", ".join(f"{len(index)} images in {len(index.shards)} shards" for index in sets.train)
    logger.info("data: %s; an epoch is %d", images, plan.epoch_size)
    for line in reading.describe(worker_rate(batches, start_step * plan.accumulation)):
        logger.info("%s", line)
    logger.info("evaluation: %s", sets.rule)
    logger.info(
        "processes: %d (%s, %s) on %s, precision %s",
        accelerator.num_processes,
        accelerator.distributed_type.value,
        launch.name(),
        accelerator.device,
        recipe.mixed_precision,
    )
    logger.info("%s", plan.describe())
    loose = [key for key in level_c if _value_at(recipe, key)]
    loose += ["mixed_precision"] if recipe.mixed_precision != "no" else []
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
