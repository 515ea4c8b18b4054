"""The arithmetic of a run: what a step is, and how many there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ssl_vit.config import Duration, InputError
from ssl_vit.data.order import steps_of
from ssl_vit.objectives.base import Progress
from ssl_vit.training.optim import OptimSection, absolute_lr
from ssl_vit.training.schedules import SCHEDULES, warmup_multistep


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
        optim, peak = self.optim, absolute_lr(self.optim)
        if optim.schedule == "multistep":
            milestones = [milestone.steps(self.steps_per_epoch) for milestone in optim.milestones]
            return warmup_multistep(step, self.warmup_steps, peak, milestones, optim.gamma, optim.warmup_lr)
        schedule = SCHEDULES[optim.schedule]
        return schedule(step, self.total_steps, self.warmup_steps, peak, optim.min_lr, optim.warmup_lr)

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
