"""One loop for every objective: next batch, forward, backward, step, after_step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ssl_vit import distributed
from ssl_vit.config import Duration, InputError
from ssl_vit.data.bad_samples import BadReport
from ssl_vit.data.loader import STEP_SEED, Batch, Pixels, TrainBatches, iterate
from ssl_vit.data.order import derive_seed, steps_of
from ssl_vit.data.views import seed_generators
from ssl_vit.objectives.base import Objective, Progress
from ssl_vit.training.checkpoint import Checkpoints
from ssl_vit.training.metrics import MetricsLog
from ssl_vit.training.optim import OptimSection, absolute_lr
from ssl_vit.training.schedules import SCHEDULES
from ssl_vit.training.signals import Preempted, StopRequest


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run: what a step is, and how many there are.

    Args:
        optim: batch size, durations and learning rates.
        epoch_size: samples an epoch.
        micro_batch_size: images a device and forward pass.
        num_ranks: number of processes.
    """

    optim: OptimSection
    epoch_size: int
    micro_batch_size: int
    num_ranks: int = 1

    @property
    def steps_per_epoch(self) -> float:
        """Not rounded: batches run across the ends of epochs."""
        return self.epoch_size / self.optim.batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        epochs = self.optim.epochs
        if epochs.unit == "steps":
            return int(epochs.value)
        return steps_of(epochs.value, self.epoch_size, self.optim.batch_size)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return self.optim.warmup_epochs.steps(self.steps_per_epoch)

    def check(self) -> None:
        """What only the size of the data decides.

        Raises:
            InputError: there is no step to do, or the warm-up is longer than the run.
        """
        if self.total_steps < 1:
            raise InputError(
                f"optim.epochs={self.optim.epochs}: is less than one step of {self.optim.batch_size} images"
            )
        if self.warmup_steps > self.total_steps:
            raise InputError(
                f"optim.warmup_epochs={self.optim.warmup_epochs}: {self.warmup_steps} steps, longer than the run of "
                f"{self.total_steps} (optim.epochs={self.optim.epochs}); give a shorter one, e.g. "
                f"optim.warmup_epochs={self.total_steps // 20}steps"
            )

    @property
    def accumulation(self) -> int:
        """Forward passes of a device in one step."""
        return self.optim.batch_size // self.num_ranks // self.micro_batch_size

    def learning_rate(self, step: int) -> float:
        """The learning rate of the step after ``step`` steps."""
        schedule = SCHEDULES[self.optim.schedule]
        return schedule(step, self.total_steps, self.warmup_steps, absolute_lr(self.optim), self.optim.min_lr)

    def ends(self, period: Duration | None) -> Callable[[int], bool]:
        """A function of the steps done: whether a multiple of ``period`` has just ended; None: never."""
        return lambda step: period is not None and period.due(step, self.steps_per_epoch)

    def progress(self, step: int) -> Progress:
        """Where the run is after ``step`` steps."""
        per_epoch = self.steps_per_epoch
        total = self.total_steps
        return Progress(step, total, step / per_epoch, total / per_epoch, step / max(total, 1))

    def describe(self) -> str:
        """The line a person checks first."""
        return (
            f"global batch {self.optim.batch_size} = micro-batch {self.micro_batch_size} x processes {self.num_ranks} "
            f"x accumulation {self.accumulation}, lr {absolute_lr(self.optim):.3e}, {self.total_steps} steps of "
            f"{self.steps_per_epoch:.1f} an epoch"
        )


@dataclass
class Trainer:
    """The training loop.

    Args:
        accelerator: holds device, precision and strategy.
        wrapped: the objective as ``accelerator.prepare`` returned it; every call on weights goes through it.
        objective: the same, unwrapped: schedules, EMA and saving.
        optimizer: likewise.
        batches: the training samples of this process.
        pixels: normalisation.
        plan: batch and step arithmetic.
        seed: of the run.
        log: metrics.
        checkpoints: where to save.
        evaluate: called with the number of steps done, before the first step and after each.
        on_bad: called with the reports of samples that did not decode and the number of samples seen.
        stop: asked after each step whether to save and end.
        start_step: steps done before this process started.
        save_due: whether to save after so many steps; the last step is always saved.
        log_every: steps between log lines.
        workers: loader processes.
        state: saved with each checkpoint.
    """

    accelerator: Accelerator
    wrapped: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    batches: TrainBatches
    pixels: Pixels
    plan: Plan
    seed: int
    log: MetricsLog
    checkpoints: Checkpoints
    evaluate: Callable[[int], None]
    on_bad: Callable[[list[BadReport], int], None]
    stop: StopRequest
    start_step: int = 0
    save_due: Callable[[int], bool] = lambda step: False
    log_every: int = 20
    workers: int = 2
    state: dict[str, Any] = field(default_factory=dict)

    def fit(self) -> None:
        """Run all steps that are left, and save the last.

        Raises:
            Preempted: a signal asked for it; a checkpoint of the last step is there.
        """
        plan, total = self.plan, self.plan.total_steps
        if self.start_step == 0:
            self.evaluate(0)
            self._save(0)
        loader = self._loader()
        self.wrapped.train()
        window_start, waited, window_steps = time.perf_counter(), 0.0, 0

        for step in range(self.start_step, total):
            # generators: drop path and mixup draw from them, whatever came before
            self._seed(step)

            # schedules
            self.objective.before_step(plan.progress(step))
            lr = plan.learning_rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

            # micro-batches: forward and backward
            losses, metrics = [], {}
            for micro in range(plan.accumulation):
                waiting = time.perf_counter()
                batch = self._next(loader, step)
                waited += time.perf_counter() - waiting
                loss, metrics = self._forward_backward(batch, last=micro == plan.accumulation - 1)
                losses.append(loss)

            # step
            if plan.optim.clip_grad is not None:
                norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), plan.optim.clip_grad)
                metrics["grad_norm"] = torch.as_tensor(norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.objective.after_step()

            # log, evaluate, save
            done, window_steps = step + 1, window_steps + 1
            if done % self.log_every == 0 or done == total:
                values = self._fetch({"loss": torch.stack(losses).mean(), **metrics})
                elapsed = time.perf_counter() - window_start
                self.log.train(
                    {
                        "step": done,
                        "epoch": done / plan.steps_per_epoch,
                        **values,
                        "lr": lr,
                        "images_per_second": window_steps * plan.optim.batch_size / elapsed,
                        "data_wait": waited / elapsed,
                        "samples_seen": done * plan.optim.batch_size,
                        **self._memory(),
                    }
                )
                if values["loss"] != values["loss"]:
                    raise FloatingPointError(f"step {done}: the loss is not a number; lower optim.base_lr or clip_grad")
                window_start, waited, window_steps = time.perf_counter(), 0.0, 0
            pause = time.perf_counter()
            self.evaluate(done)
            stopping = self.stop.agreed(self.accelerator.device)
            if self.save_due(done) or done == total or stopping:
                self._save(done)
            if stopping and done < total:
                raise Preempted(done, self.stop.name())
            window_start += time.perf_counter() - pause

    def _seed(self, step: int) -> None:
        seed = derive_seed(self.seed, STEP_SEED, step, distributed.rank())
        seed_generators(seed)
        if self.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)

    def _loader(self) -> Iterator[tuple[Batch, list[BadReport]]]:
        accumulation = self.plan.accumulation
        items = range(self.start_step * accumulation, self.plan.total_steps * accumulation)
        return iterate(self.batches, items, self.workers, pin_memory=self.accelerator.device.type == "cuda")

    def _next(self, loader: Iterator[tuple[Batch, list[BadReport]]], step: int) -> Batch:
        batch, reports = next(loader)
        if reports:
            self.on_bad(reports, (step + 1) * self.plan.optim.batch_size)
        return self.pixels.to_device(batch, self.accelerator.device)

    def _forward_backward(self, batch: Batch, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients are averaged over processes once a step, at its last micro-batch."""
        sync = contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)
        with sync:
            loss, metrics = self.wrapped(batch, call="loss")
            self.accelerator.backward(loss / self.plan.accumulation)
        return loss.detach().float(), dict(metrics)

    def _fetch(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Means over the processes, copied to the host at once."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        means = distributed.all_sum(stacked) / distributed.world_size()
        return dict(zip(values, means.tolist(), strict=True))

    def _memory(self) -> dict[str, int]:
        """Largest bytes allocated on a GPU since the run began; nothing on a CPU."""
        cuda = self.accelerator.device.type == "cuda"
        return {"memory": torch.cuda.max_memory_allocated(self.accelerator.device)} if cuda else {}

    def _save(self, step: int) -> None:
        if distributed.is_main():
            state = {**self.state, "samples_seen": step * self.plan.optim.batch_size}
            self.checkpoints.save(step, self.objective, self.optimizer, state)
        distributed.barrier()
