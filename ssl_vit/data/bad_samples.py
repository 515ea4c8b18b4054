"""Samples that do not decode: named, counted, and too many of them stop the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ssl_vit.config import InputError

logger = logging.getLogger(__name__)

SHOWN = 5


@dataclass
class BadReport:
    """Samples that did not decode, with the reason, on their way from a worker to the main process."""

    source: int
    sample: int
    name: str
    reason: str
    position: int = -1


class BadSamples:
    """Counts and names samples that did not decode, in ``bad_samples.jsonl``; stops above a share.

    Args:
        path: of the file.
        max_fraction: of the samples seen.
    """

    def __init__(self, path: Path, max_fraction: float) -> None:
        self.path, self.max_fraction, self.count = path, max_fraction, 0

    def __call__(self, reports: Iterable[BadReport], seen: int | None = None) -> None:
        """Write the reports; ``seen`` is the number of training samples so far."""
        with open(self.path, "a", encoding="utf-8") as file:
            for report in reports:
                self.count += 1
                if self.count <= SHOWN:
                    logger.warning("bad sample: %s: %s", report.name, report.reason)
                file.write(json.dumps(asdict(report)) + "\n")
        if seen and self.count > max(self.max_fraction * seen, 1):
            raise InputError(
                f"{self.count} of {seen} samples did not decode, more than data.max_bad_fraction={self.max_fraction}; "
                f"they are named in {self.path}"
            )
