"""Judging the checkpoints of a run while it is being trained, each of them once."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from ssl_vit import build, distributed, splits
from ssl_vit.config import InputError
from ssl_vit.encoders.base import Encoder
from ssl_vit.encoders.weights import fill_encoder
from ssl_vit.html_report import write_report
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import EvaluationRecipe
from ssl_vit.run import measure, subject_of
from ssl_vit.training.checkpoint import Checkpoints
from ssl_vit.training.launch import Launch
from ssl_vit.training.metrics import MetricsLog, read_metrics
from ssl_vit.training.run_folder import RunFolder
from ssl_vit.training.signals import Interrupted, Preempted, StopRequest
from ssl_vit.training.strategies import forward_in_precision

logger = logging.getLogger(__name__)

POLL = 5.0
"""Seconds between two looks at the run."""
ENDED = -2
NOTHING_NEW = -1


def check_watched(path: Path) -> RunFolder:
    """The run to watch.

    Raises:
        InputError: there is none.
    """
    folder = RunFolder(path)
    if not (folder.path / "recipe.yaml").is_file():
        raise InputError(
            f"--watch {path}: holds no run (no recipe.yaml); give the run.dir of a training that has begun"
        )
    return folder


def watch(recipe: EvaluationRecipe, path: Path) -> None:
    """Measure every checkpoint of a run with all of ``evals``, until the run is finished and nothing is left.

    Numbers go to ``RUN/watch/metrics.jsonl`` and ``RUN/tensorboard/watch``; what is measured there is not measured
    again, whenever this is started.

    Args:
        recipe: of the measurements.
        path: of the run.
    """
    with StopRequest() as stop:
        run, place = check_watched(path), RunFolder(path / "watch")
        launch = Launch.asked_for().replicated()
        pixels = build.resolve_pixels(recipe.data, recipe.encoder)
        precision = build.resolve_precision(recipe)
        objective = Objective(build.build_encoder(recipe.encoder)).requires_grad_(False).eval()
        sets = splits.open_sets(recipe.data)
        evaluations = build.build_evaluations(recipe.evals, sets.val is not None, sets.probe, objective)
        workers = build.loader_workers(recipe.run)
        place.lock()
        accelerator = launch.open(precision, recipe.run.deterministic)
        main, device = accelerator.is_main_process, accelerator.device
        if main:
            place.path.mkdir(parents=True, exist_ok=True)
        events = run.path / "tensorboard" / "watch"
        log = MetricsLog(place.path, MetricsLog.KEEP_ALL, 0, recipe.run.tensorboard, main, events)
        encoder = objective.to(device).encoder
        forward_in_precision(objective, accelerator)
        bad = build.bad_record(place.path, MetricsLog.KEEP_ALL, main)
        subject = subject_of(recipe, encoder, objective, pixels, sets, device, workers, log, bad)
        subject.pause_point = lambda: stop.check(device)
        stop.waits, lost = True, set[int]()
        try:
            while True:
                subject.pause_point()
                found = next_step(run, place, list(evaluations), lost) if main else ENDED
                step = int(distributed.all_max(torch.tensor(found, device=device)).item())
                if step == ENDED:
                    break
                if step == NOTHING_NEW:
                    time.sleep(POLL)
                    continue
                error = load(encoder, run, step)
                found = 0 if error is None else 1 if isinstance(error, Gone) else 2
                worst = int(distributed.all_max(torch.tensor(found, device=device)).item())
                if worst == 2:  # nobody leaves before all know
                    raise error or InputError(f"step {step}: its checkpoint cannot be read")
                if worst == 1:
                    logger.warning("step %d: its checkpoint was deleted before it was read; see run.keep_last", step)
                    lost.add(step)
                    continue
                due = {name: e for name, e in evaluations.items() if name not in measured(place).get(step, ())}
                distributed.barrier()  # nobody may look after the main process has written
                results = measure(subject.at(step), due)
                note(log, run, step, results)
        except Interrupted:
            raise Preempted(0, None, stop.name(), kept="what was measured") from None
        finally:
            log.close()
        logger.info("%s: the run is %s and every checkpoint that is kept is measured", path, run.read_status()["state"])


def note(log: MetricsLog, run: RunFolder, step: int, results: dict[str, float]) -> None:
    """Write what was measured, and the run's page with it."""
    log.evaluation(step, results)
    if distributed.is_main():
        write_report(run.path)


class Gone(Exception):
    """The run has deleted a checkpoint."""


def load(encoder: Encoder, run: RunFolder, step: int) -> Exception | None:
    """Fill an encoder from the checkpoint of a step; what went wrong, :class:`Gone` if it is not there any more."""
    folder = Checkpoints(run.checkpoints).path(step)
    try:
        fill_encoder(encoder, folder)
    except (InputError, OSError) as error:
        return error if (folder / "manifest.json").is_file() else Gone()
    return None


def measured(place: RunFolder) -> dict[int, set[str]]:
    """Names of the evaluations that are there of each step."""
    file = place.path / "metrics.jsonl"
    done: dict[int, set[str]] = {}
    for line in read_metrics(file) if file.is_file() else ():
        done.setdefault(line["step"], set()).update(name.partition("/")[0] for name in line if name != "step")
    return done


def next_step(run: RunFolder, place: RunFolder, names: list[str], lost: set[int]) -> int:
    """The first step that is saved and not measured; else whether one may still come (NOTHING_NEW) or not (ENDED)."""
    ended = run.read_status().get("state") in ("finished", "failed")  # read first: what it saved last is there by now
    done = measured(place)
    for step in Checkpoints(run.checkpoints).steps():
        if step not in lost and set(names) - done.get(step, set()):
            return step
    return ENDED if ended else NOTHING_NEW
