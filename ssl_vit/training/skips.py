"""Steps without an update because a loss or gradient was not finite: named, counted, and too many in a row undone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

SHOWN = 5


class Diverged(Exception):
    """Too many steps in a row were not finite.

    Args:
        steps: the steps, counted from 1.
    """

    def __init__(self, steps: list[int]) -> None:
        super().__init__(f"steps {steps[0]} to {steps[-1]}: loss or gradients were not finite")
        self.steps = steps


@dataclass
class Skips:
    """The skipped steps of a run, counted from 1; a skipped step keeps its number, its batch and its lr.

    Args:
        path: ``RUN/bad_batches.jsonl``.
        limit: so many in a row raise :class:`Diverged`.
        samples: names of the samples of a step.
        steps: all that were skipped so far; saved with each checkpoint.
        barred: steps that make no update when they are run again.
        active: whether this process writes.
    """

    path: Path
    limit: int
    samples: Callable[[int], list[str]]
    steps: list[int] = field(default_factory=list)
    barred: set[int] = field(default_factory=set)
    active: bool = True

    def note(self, step: int) -> None:
        """Count a skipped step and name its samples.

        Raises:
            Diverged: it was the last of ``limit`` in a row.
        """
        self.steps.append(step)
        if self.active:
            line = {"step": step, "barred": step in self.barred, "samples": self.samples(step)}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if len(self.steps) <= SHOWN:
                logger.warning("step %d: loss or gradients are not finite; skipped, named in %s", step, self.path)
        tail = [s for s in self.steps[-self.limit :] if s not in self.barred]
        if len(tail) == self.limit and tail[-1] - tail[0] == self.limit - 1:
            raise Diverged(tail)

    def hopeless(self, step: int) -> bool:
        """Whether the ``limit`` steps that end with ``step`` were all skipped."""
        return set(range(step - self.limit + 1, step + 1)) <= set(self.steps)

    def undo(self, step: int, bar: list[int]) -> None:
        """Forget what came after ``step``; the steps ``bar`` will make no update."""
        self.steps = [s for s in self.steps if s <= step]
        self.barred |= set(bar)
