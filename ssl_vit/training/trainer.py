"""One loop for every objective: next batch, forward, backward, step, after_step, log, evaluate, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from ssl_vit import distributed
from ssl_vit.data.bad_samples import BadReport, BadSamples
from ssl_vit.data.loader import STEP_SEED, Batch, Pixels, TrainBatches, iterate
from ssl_vit.data.order import derive_seed
from ssl_vit.data.views import seed_generators
from ssl_vit.data.worker_count import cores_of_a_process, waiting_advice
from ssl_vit.data.workers import STALL
from ssl_vit.training.checkpoint import Checkpoints
from ssl_vit.training.metrics import MetricsLog, truncate_metrics
from ssl_vit.training.optim import set_schedule
from ssl_vit.training.plan import Plan
from ssl_vit.training.signals import Flags, Interrupted, Preempted, StopRequest
from ssl_vit.training.skips import Diverged, Skips
from ssl_vit.training.strategies import Strategy
from ssl_vit.training.supply import MicroBatch, Supply

logger = logging.getLogger(__name__)

MUCH_WAITING = 0.1
"""Share of the time that steps wait for images, above which the log says what would help."""
SETTLED = 100
"""Steps after which the numbers of a run are looked at for symptoms."""


@dataclass
class Trainer:
    """The training loop.

    Args:
        strategy: holds the objective as prepared for training, its optimizer, device and processes.
        batches: the training samples of this process.
        pixels: normalisation.
        plan: batch and step arithmetic.
        seed: of the run.
        log: metrics.
        checkpoints: where to save.
        evaluate: called with the number of steps done, before the first step and after each; returns what it measured.
        bad: samples that did not decode.
        stop: the signals that this process got.
        skips: steps that made no update.
        start_step: steps done before this process started.
        evaluated: whether the evaluations after ``start_step`` are done.
        save_due: whether to save after so many steps; the last step is always saved.
        keep_best: name of a measured number; the checkpoint with its highest value is saved and kept.
        log_every: steps between log lines.
        workers: loader processes.
        stall_timeout: seconds without a batch after which the run saves and stops.
        on_samples: called with each step and the positions that this process trains on.
        evaluation_due: whether ``evaluate`` will measure anything; it waits for the device then.
        peak_rate: images/s at which each device would compute at its peak, for ``mfu``; None: it is not logged.
        state: saved with each checkpoint.
    """

    strategy: Strategy
    batches: TrainBatches
    pixels: Pixels
    plan: Plan
    seed: int
    log: MetricsLog
    checkpoints: Checkpoints
    evaluate: Callable[[int], dict[str, float]]
    bad: BadSamples
    stop: StopRequest
    skips: Skips
    start_step: int = 0
    evaluated: bool = False
    save_due: Callable[[int], bool] = lambda step: False
    keep_best: str | None = None
    log_every: int = 20
    workers: int = 2
    stall_timeout: float = STALL
    on_samples: Callable[[int, list[int]], None] | None = None
    evaluation_due: Callable[[int], bool] = lambda step: False
    peak_rate: float | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def fit(self) -> None:
        """Run all steps that are left, and save the last.

        Raises:
            Preempted: a signal asked for it, or a process has no data; a checkpoint of the last step is there.
            FloatingPointError: losses or gradients were not finite again after going back to a checkpoint.
        """
        self.device, self.objective = self.strategy.device, self.strategy.objective
        self.flags, self.saved, self.rolled_back = Flags(self.device), self.start_step or None, False
        self.ill = self.waiting = 0
        start = self.start_step
        if not self.evaluated:
            self._evaluate(start)
        if start == 0:
            self._save(0)
        total = self.plan.total_steps
        while start < total:
            try:
                self._steps(start)
                start = total
            except Diverged as error:
                start = self._roll_back(error)
        if self.skips.hopeless(total):
            raise self._broken("the run ended without an update in its last steps")

    def _steps(self, start: int) -> None:
        plan, total = self.plan, self.plan.total_steps
        supply = Supply(self._loader(start), plan.accumulation, 1 + self.flags.delay, self.device)
        self.strategy.wrapped.train()
        window_start, window_steps = time.perf_counter(), 0
        self._fetch(supply)
        self.flags.put(start, self.stop.number, torch.zeros((), device=self.device))
        if self._stop_asked(wait=True):
            self._preempt(start)

        for step in range(start, total):
            # generators: drop path and mixup draw from them, whatever came before
            self._seed(step)

            # schedules
            progress, lr = plan.progress(step), plan.learning_rate(step)
            self.objective.before_step(progress)
            set_schedule(self.strategy.param_groups, plan.optim, lr, progress.fraction)

            # micro-batches: forward and backward
            losses, metrics = [], {}
            for number, micro in enumerate(supply.take()):
                self._note_samples(micro, step)
                batch = self.pixels.normalised(micro.batch)
                with self.strategy.micro_step(last=number == plan.accumulation - 1):
                    loss, metrics = self.strategy.wrapped(batch, call="loss")
                    losses.append(loss.detach().float())
                    self.strategy.backward(self._finite_or_nan(loss, step + 1))

            # step
            skipped, grad_norm = self.strategy.step()
            self.objective.after_step(1 - skipped)

            # log
            done, window_steps = step + 1, window_steps + 1
            self._fetch(supply)
            self.flags.put(done, self.stop.number, skipped)
            if done % self.log_every == 0 or done == total:
                values = {"loss": torch.stack(losses).mean(), **metrics, "grad_norm": grad_norm}
                means = mean_values(values)  # waits for the device: only then the time is that of the steps
                now = time.perf_counter()
                speed = {
                    "images_per_second": window_steps * plan.optim.batch_size / (now - window_start),
                    "data_wait": supply.waited() / (now - window_start),
                }
                self._log(done, lr, means, speed)
                window_start, window_steps = now, 0

            # evaluate, save, stop
            asked = self._stop_asked(wait=self.save_due(done) or self.evaluation_due(done) or done == total)
            pause = time.perf_counter()
            if asked and done < total:
                self._preempt(done)
            self._evaluate(done)
            if self.save_due(done) or done == total or self.best_step == done:
                self._save(done)
            window_start += time.perf_counter() - pause

    def _finite_or_nan(self, loss: Tensor, done: int) -> Tensor:
        """The loss, times NaN where no update may come of it: every process then sees gradients that are not finite."""
        fine = loss.detach().isfinite() & (done not in self.skips.barred)
        return loss * torch.where(fine, 1.0, float("nan"))

    def _stop_asked(self, wait: bool) -> bool:
        """Take note of skipped steps; whether any process was asked to stop."""
        asked = False
        for step, number, skipped in self.flags.get(wait):
            self.stop.number = self.stop.number or number
            asked = asked or number > 0
            if skipped:
                self.skips.note(step)
        return asked

    def _evaluate(self, done: int) -> None:
        try:
            results = self.evaluate(done)
        except Interrupted:
            self._preempt(done)
        else:
            value, best = results.get(self.keep_best or ""), self.state.get("best")
            if value is not None and (best is None or value > best["value"]):
                self.state["best"] = {"name": self.keep_best, "value": value, "step": done}

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint is the best so far."""
        return self.state.get("best", {}).get("step")

    def _preempt(self, done: int) -> NoReturn:
        if self.saved != done:
            self._save(done, evaluated=False)
        raise Preempted(done, self.saved, self.stop.name())

    def _roll_back(self, error: Diverged) -> int:
        """Go back to the newest checkpoint; the steps that failed will make no update."""
        found = self.checkpoints.newest_whole(set_aside=False)
        if self.rolled_back or found is None:
            raise self._broken(f"{error}, also after going back to a checkpoint") from None
        folder, saved = found
        logger.warning("%s; going back to %s, these steps will make no update", error, folder.name)
        self.strategy.load(saved.weights, saved.optimizer)
        self.skips.undo(saved.step, bar=error.steps)
        self.flags, self.rolled_back, self.saved = Flags(self.device), True, saved.step
        self.log.rewind(saved.step)
        if self.log.active:
            truncate_metrics(self.bad.path, saved.step)
        self.bad.go_on(saved.state.get("bad_samples", 0))
        return saved.step

    def _broken(self, what: str) -> FloatingPointError:
        steps = self.checkpoints.steps()
        good = self.best_step if self.best_step in steps else steps[-1] if steps else None
        left = "" if good is None else f"; {self.checkpoints.path(good)} can be used"
        return FloatingPointError(
            f"{what}{left}; the samples are named in {self.skips.path}; lower optim.base_lr, set optim.clip_grad, or "
            "look at these samples, and start a new run"
        )

    def _seed(self, step: int) -> None:
        seed = derive_seed(self.seed, STEP_SEED, step, distributed.rank())
        seed_generators(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)

    def _loader(self, start: int) -> Iterator[tuple[Batch, list[BadReport]]]:
        accumulation = self.plan.accumulation
        items = range(start * accumulation, self.plan.total_steps * accumulation)
        return iterate(self.batches, items, self.workers, self.device.type == "cuda", self.stall_timeout)

    def _fetch(self, supply: Supply) -> None:
        """Fetch the next batches, or ask all processes to stop."""
        supply.fetch()
        if supply.failure:
            self.stop.no_data(supply.failure)

    def _note_samples(self, micro: MicroBatch, step: int) -> None:
        if micro.reports:
            self.bad.replaced(micro.reports, step + 1)
        if self.on_samples is not None:
            self.on_samples(step + 1, micro.positions.tolist())

    def _log(self, done: int, lr: float, means: dict[str, float], speed: dict[str, float]) -> None:
        line = {"step": done, "epoch": done / self.plan.steps_per_epoch, **means}
        line |= {"lr": lr, **speed, "samples_seen": done * self.plan.optim.batch_size}
        if self.peak_rate:
            line["mfu"] = line["images_per_second"] / distributed.world_size() / self.peak_rate
        if self.device.type == "cuda":
            line["memory"] = torch.cuda.max_memory_allocated(self.device)
        if self.skips.steps:
            line["skipped"] = len(self.skips.steps)
        self.log.train(line)
        self.bad.check(line["samples_seen"], self.device)
        self.waiting = self.waiting + 1 if line["data_wait"] > MUCH_WAITING else 0
        if self.waiting == 2 and self.log.active:
            rate, cores = line["images_per_second"] / distributed.world_size(), cores_of_a_process()
            logger.warning("step %d: %s", done, waiting_advice(line["data_wait"], self.workers, rate, cores))
        # early numbers tell nothing yet, and one line may be chance
        symptom = self.objective.symptom(line) if done >= min(SETTLED, self.plan.total_steps / 2) else None
        self.ill = self.ill + 1 if symptom else 0
        if self.ill == 2 and self.log.active:
            logger.warning("step %d: %s", done, symptom)

    def _save(self, step: int, evaluated: bool = True) -> None:
        """Write a checkpoint; a full disk costs this one, not the run."""
        weights, optimizer = self.strategy.weights(), self.strategy.optimizer_state()
        failed, bad = torch.zeros((), device=self.device), self.bad.total(self.device)
        if distributed.is_main():
            self.state |= {"samples_seen": step * self.plan.optim.batch_size, "evaluated": evaluated}
            self.state |= {"bad_samples": bad, "skipped": self.skips.steps, "barred": sorted(self.skips.barred)}
            try:
                self.checkpoints.save(step, weights, optimizer, self.state)
            except OSError as error:
                logger.error("step %d: not saved: %s; free some space, the run goes on", step, error)
                failed += 1
        if distributed.all_max(failed).item() == 0:
            self.saved = step
        elif step == self.plan.total_steps:
            raise OSError(f"the checkpoint of the last step could not be written into {self.checkpoints.folder}")


def mean_values(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Means of scalars over the processes, copied to the host at once."""
    stacked = torch.stack([value.detach().float() for value in tensors.values()])
    means = (distributed.all_sum(stacked) / distributed.world_size()).tolist()
    return dict(zip(tensors, means, strict=True))
