"""Signals end a run between two steps: saved, resumable, on all processes alike."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType

import torch

from ssl_vit import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""What accelerate's and torch's launchers leave in the environment of the processes they start."""
ONE_REQUEST = 2.0
"""Seconds in which further signals are the same request: a launcher hands on what the whole group got already."""
NO_DATA = 1000
"""Beside signal numbers: the next batch cannot be had."""
_PR_SET_PDEATHSIG = 1


class Preempted(BaseException):
    """The run was asked to stop.

    No Exception, as KeyboardInterrupt is none: a handler raises it anywhere, also where a library goes on after any
    Exception.

    Args:
        step: steps done.
        saved: the step that a restart goes on from, None if there is no checkpoint.
        name: of the signal.
        together: whether every process stops for this reason.
        kept: what is there without a checkpoint.
    """

    def __init__(self, step: int, saved: int | None, name: str, together: bool = True, kept: str | None = None) -> None:
        what = "stopped before the first checkpoint" if saved is None else f"saved after step {saved}"
        what = f"stopped; kept: {kept}" if kept else what
        super().__init__(f"{name}: {what}; start the same command again to go on")
        self.step, self.together = step, together


class Interrupted(Exception):
    """An evaluation was left because every process knows of a signal."""


class StopRequest:
    """Notes the first signal, or that there is no data, inside a ``with`` block; a later one ends the process at once.

    Outside the training loop (``waits`` is False) there is nothing to save: the first signal raises
    :class:`Preempted` where it arrives, e.g. in packing. A launcher that dies takes nothing along: its children get
    SIGTERM then. A process started by hand keeps running when its shell goes.
    """

    def __init__(self) -> None:
        self.number, self.waits, self.step, self.reason = 0, False, 0, ""
        self._since = 0.0

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if sys.platform == "linux" and any(name in os.environ for name in LAUNCHED):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if self._since and time.monotonic() - self._since > ONE_REQUEST:
                os._exit(128 + number)
            self._since = self._since or time.monotonic()  # the first one, of a run that stops for want of data
            return
        self.number, self._since = number, time.monotonic()
        if not self.waits:
            raise Preempted(self.step, self.step or None, self.name(), together=False)

    def no_data(self, reason: str) -> None:
        """Ask for a stop because this process cannot get its next batch."""
        self.number, self.reason = NO_DATA, reason

    def check(self, device: torch.device) -> None:
        """Called by all processes at the same places of an evaluation.

        Raises:
            Interrupted: any process was asked to stop.
        """
        flag = torch.tensor(float(self.number), device=device)
        self.number = int(distributed.all_max(flag).item())
        if self.number:
            raise Interrupted

    def name(self) -> str:
        """The signal's name, or why there is no data; called by all processes that stop together."""
        if self.number == NO_DATA:
            return next(filter(None, distributed.all_objects(self.reason)))
        return signal.Signals(self.number).name if self.number else "stopped"


class Flags:
    """What all processes agree on after each step, fetched without waiting for the device: on a GPU a step later.

    Args:
        device: of the training; ``delay`` is by how many steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.delay = device, 1 if device.type == "cuda" else 0
        self._pending: list[tuple[int, torch.Tensor, torch.cuda.Event | None]] = []

    def put(self, step: int, signal_number: int, skipped: torch.Tensor) -> None:
        """Share the signal that this process got and whether step ``step`` was skipped."""
        shared = self.agreed(signal_number, skipped)
        if self.device.type != "cuda":
            self._pending.append((step, shared, None))
            return
        host = torch.empty(2, pin_memory=True)
        host.copy_(shared, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # waiting for it leaves its core to a loader process
        event.record()
        self._pending.append((step, host, event))

    def agreed(self, signal_number: int, skipped: torch.Tensor) -> torch.Tensor:
        """(2,) on the device; filled there: to copy the number from the host would be to wait for the step."""
        return distributed.all_max(torch.stack([skipped.new_full((), signal_number), skipped]))

    def get(self, wait: bool) -> list[tuple[int, int, bool]]:
        """(step, signal number, skipped) of each step that is known; with ``wait`` of all."""
        keep = 0 if wait else self.delay
        ready, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        found = []
        for step, values, event in ready:
            if event is not None:
                event.synchronize()
            number, skipped = values.tolist()
            found.append((step, int(number), bool(skipped)))
        return found
