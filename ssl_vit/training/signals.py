"""Signals end a run between two steps: saved, resumable, on all processes alike."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

import torch

from ssl_vit import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""What accelerate's and torch's launchers leave in the environment of the processes they start."""
_PR_SET_PDEATHSIG = 1


class Preempted(Exception):
    """The run was asked to stop and has saved after ``step`` steps."""

    def __init__(self, step: int, name: str) -> None:
        super().__init__(f"{name}: saved after step {step}; start the same command again to go on")
        self.step = step


class StopRequest:
    """Notes the first signal inside a ``with`` block; a second one ends the process at once.

    A launcher that dies takes nothing along: its children get SIGTERM then. A process started by hand keeps running
    when its shell goes.
    """

    def __init__(self) -> None:
        self.number = 0

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
            os._exit(128 + number)
        self.number = number

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop; every process gets the same answer in the same step."""
        if distributed.world_size() == 1:
            return self.number > 0
        self.number = int(distributed.all_max(torch.tensor(self.number, device=device)).item())
        return self.number > 0

    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name if self.number else "stopped"
