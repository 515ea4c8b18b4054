"""Where a run's numbers go: metrics.jsonl, TensorBoard, a progress bar or plain lines.

A tracker that fails is reported once and never stops training; metrics.jsonl is the record.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)


class MetricsLog:
    """The record of one run, written by the main process only.

    Args:
        folder: of the run.
        start_step: steps already done, -1 for a new start; later lines of an earlier attempt are cut off.
        total_steps: for the progress display.
        tensorboard: also write ``RUN/tensorboard``.
        active: False on all but the main process: every method does nothing.
        events: folder for TensorBoard in the place of ``RUN/tensorboard``.
    """

    KEEP_ALL = 10**12
    """A start step that cuts nothing off."""

    def __init__(
        self,
        folder: Path,
        start_step: int,
        total_steps: int,
        tensorboard: bool,
        active: bool = True,
        events: Path | None = None,
    ) -> None:
        self.events = events or folder / "tensorboard"
        self.active, self.total_steps, self.start_step = active, total_steps, start_step
        self.writer: Any = None
        self.bar: Any = None
        if not active:
            return
        self.path, self.pictures = folder / "metrics.jsonl", folder / "pictures"
        truncate_metrics(self.path, start_step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            self._tracker("open", lambda: self._open_tensorboard(start_step))
        if sys.stderr.isatty() and total_steps:
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, initial=max(start_step, 0), unit="step", dynamic_ncols=True)

    def _open_tensorboard(self, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.events), purge_step=start_step + 1)

    def _tracker(self, what: str, action: Any) -> None:
        try:
            action()
        except Exception as error:
            logger.warning("TensorBoard: cannot %s (%s); the run goes on, metrics.jsonl has all numbers", what, error)
            self.writer = None

    def train(self, line: dict[str, Any]) -> None:
        """One training line: step, epoch, loss, lr, images_per_second, data_wait, samples_seen and the like."""
        if not self.active:
            return
        self._write(line)
        images_left = (self.total_steps - line["step"]) * line["samples_seen"] / line["step"]
        eta = images_left / line["images_per_second"]
        text = (
            f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['images_per_second']:.0f} images/s  "
            f"data_wait {line['data_wait']:.0%}"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(line["step"] - self.bar.n)
        else:
            logger.info(
                "step %d/%d  epoch %.2f  %s  ETA %s", line["step"], self.total_steps, line["epoch"], text, clock(eta)
            )

    def evaluation(self, step: int, results: dict[str, float]) -> None:
        """One line with the numbers of a step's evaluations."""
        if not self.active or not results:
            return
        self._write({"step": step, **results})

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 (H, W, 3) picture as ``RUN/pictures/NAME_XXXXXXXX.png`` and in TensorBoard."""
        if not self.active:
            return
        self.pictures.mkdir(exist_ok=True)
        Image.fromarray(image).save(self.pictures / f"{name}_{step:08d}.png")
        if self.writer is not None:
            self._tracker("write a picture", lambda: self.writer.add_image(name, image, step, dataformats="HWC"))

    def config(self, recipe_yaml: str) -> None:
        """The recipe, as text: nested values cannot break a tracker that way."""
        if self.writer is not None:
            text = "".join(f"    {line}\n" for line in recipe_yaml.splitlines())
            self._tracker("write the recipe", lambda: self.writer.add_text("recipe", text, max(self.start_step, 0)))

    def _write(self, line: dict[str, Any]) -> None:
        # NaN and infinity are not JSON; they are written as text so that any parser can read the record
        values = {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.writer is not None:
            self._tracker("write", lambda: self._scalars(line))

    def _scalars(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name if "/" in name else f"train/{name}", value, line["step"])

    def rewind(self, step: int) -> None:
        """Drop what was written after ``step``: the run went back to that checkpoint."""
        if not self.active:
            return
        self.file.close()
        truncate_metrics(self.path, step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if self.writer is not None:
            self._tracker("close", self.writer.close)
            self._tracker("open", lambda: self._open_tensorboard(step))
        if self.bar is not None:
            self.bar.n = step

    def close(self) -> None:
        """Flush and close everything."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.close()
        self.file.close()
        if self.writer is not None:
            self._tracker("close", self.writer.close)


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, and a half last line: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line.get("step", 0) <= step:
            kept.append(text + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clock(seconds: float) -> str:
    """``1:02:03`` for 3,723 seconds."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
