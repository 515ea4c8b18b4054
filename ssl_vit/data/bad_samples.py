"""Samples that do not decode: named, counted, and too many of them stop the run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ssl_vit import distributed
from ssl_vit.config import InputError

logger = logging.getLogger(__name__)

SHOWN = 5


@dataclass
class BadReport:
    """A sample that did not decode, with the reason, on its way from a worker to the main process.

    Args:
        source: folder or URL of its shards.
        sample: its number there.
        name: what people call it.
        reason: of the decoder.
        position: of the training stream; -1 in an evaluation.
    """

    source: str
    sample: int
    name: str
    reason: str
    position: int = -1


class BadSamples:
    """Counts and names samples that did not decode, in ``bad_samples.jsonl``; too many in training stop the run.

    In training each position counts, for the limit is a share of those; in evaluations, which read the same samples
    again and again, each sample once.

    Args:
        path: of the file, a line for each, with the step.
        max_fraction: of the training samples. The run stops above ``n + 3 sqrt(n) + 1``, where n is this share of those
            seen: a few in the first batches say nothing about the share yet.
        before: training samples that were bad before this process started, of all processes.
        active: whether this process names those of evaluations.
    """

    def __init__(self, path: Path, max_fraction: float = 1.0, before: int = 0, active: bool = True) -> None:
        self.path, self.max_fraction, self.active = path, max_fraction, active
        self.go_on(before)

    def go_on(self, before: int) -> None:
        """Count on from what the file names and ``before``."""
        self.before, self.found = before, 0
        text = self.path.read_text(encoding="utf-8") if self.active and self.path.is_file() else ""
        named = [json.loads(line) for line in text.splitlines()]
        self.evaluated = {(line["source"], line["name"]) for line in named if line["position"] < 0}

    def replaced(self, reports: Iterable[BadReport], step: int) -> None:
        """Name the bad training samples of this process in the batch of a step."""
        for report in reports:
            self.found += 1
            self._name(report, step, self.found)

    def left_out(self, reports: list[BadReport], step: int) -> None:
        """Name the bad samples of an evaluation after a step; called by all processes, each with its own."""
        for report in (report for part in distributed.all_objects(reports) for report in part):
            key = report.source, report.name
            if key not in self.evaluated:
                self.evaluated.add(key)
                if self.active:
                    self._name(report, step, len(self.evaluated))

    def _name(self, report: BadReport, step: int, number: int) -> None:
        if number <= SHOWN:
            logger.warning("bad sample: %s: %s", report.name, report.reason)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **asdict(report)}) + "\n")

    def total(self, device: torch.device) -> int:
        """Bad training samples of the whole run so far; called by all processes."""
        return self.before + int(distributed.all_sum(torch.tensor(self.found, device=device)).item())

    def check(self, seen: int, device: torch.device) -> None:
        """Compare their number with that of all training samples so far; called by all processes.

        Raises:
            InputError: on all of them, there are too many.
        """
        count, allowed = self.total(device), self.max_fraction * seen
        if count > allowed + 3 * math.sqrt(allowed) + 1:
            raise InputError(
                f"{count} of {seen} samples did not decode, more than data.max_bad_fraction={self.max_fraction}; "
                f"they are named in {self.path}"
            )
