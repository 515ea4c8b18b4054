"""Checkpoints: a folder a step, written beside its final name and renamed, so that a half one never has that name.

    RUN/checkpoints/step_00001234/  objective.safetensors  optimizer.pt  state.json  manifest.json
    RUN/checkpoints/latest          the name of the newest, a text file

Nothing random is saved: order, views, masks and the generators of a step are functions of (seed, step).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssl_vit.config import InputError
from ssl_vit.encoders.files import unusable

logger = logging.getLogger(__name__)

FORMAT = 2
SPARE_BYTES = 64 * 2**20
"""Left free on the disk for metrics, logs and pictures."""
WEIGHTS, OPTIMIZER, STATE, MANIFEST = "objective.safetensors", "optimizer.pt", "state.json", "manifest.json"


def sync_write(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step that a crash cannot halve."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Damaged(InputError):
    """A file of a checkpoint is not as it was written."""


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``RUN/checkpoints``.
        keep_last: number of newest checkpoints kept.
        keep: whether the checkpoint of a step is never deleted.
    """

    folder: Path
    keep_last: int = 2
    keep: Callable[[int], bool] = lambda step: False

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        folders = self.folder.glob("step_*") if self.folder.is_dir() else ()
        return sorted(int(f.name.removeprefix("step_")) for f in folders if (f / MANIFEST).is_file())

    def path(self, step: int) -> Path:
        """The folder of one step's checkpoint."""
        return self.folder / f"step_{step:08d}"

    def save(
        self, step: int, weights: dict[str, Tensor], optimizer: dict[str, dict[str, Tensor]], state: dict[str, Any]
    ) -> Path:
        """Write one checkpoint, point ``latest`` at it, then delete what is no longer kept.

        Args:
            step: steps done.
            weights: every tensor of the objective, whole.
            optimizer: parameter name -> state, whole.
            state: plain values.

        Raises:
            FloatingPointError: a weight is not finite; nothing was written.
            ValueError: a weight is empty, as the placeholders of sharded weights are; nothing was written.
            OSError: the disk is full or failed; earlier checkpoints are as they were.
        """
        check_tensors(weights, f"step {step}: not saved")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(weights.values(), *(values.values() for values in optimizer.values()))
        temporary = self.folder / f".writing_{step:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            self._write(temporary, step, weights, optimizer, state)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(self.path(step), ignore_errors=True)
        os.replace(temporary, self.path(step))
        sync_folder(self.folder)
        sync_write(self.folder / "latest", self.path(step).name + "\n")
        self._prune(step)
        return self.path(step)

    def _check_space(self, *groups: Iterable[Tensor]) -> None:
        needed = sum(t.numel() * t.element_size() for group in groups for t in group) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC, f"a checkpoint needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} are free", self.folder
            )

    def _write(
        self,
        folder: Path,
        step: int,
        weights: dict[str, Tensor],
        optimizer: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
    ) -> None:
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
        torch.save(optimizer, folder / OPTIMIZER)
        sync_write(folder / STATE, json.dumps({**state, "format": FORMAT, "step": step}, indent=1))
        names = (WEIGHTS, OPTIMIZER, STATE)
        for name in names:
            with open(folder / name, "rb+") as file:
                os.fsync(file.fileno())
        sync_write(folder / MANIFEST, json.dumps({name: file_sha256(folder / name) for name in names}, indent=1))
        sync_folder(folder)

    def _prune(self, newest: int) -> None:
        kept = set(self.steps()[-self.keep_last :]) | {newest}
        for step in self.steps():
            if step not in kept and not self.keep(step):
                going = self.folder / f".deleting_{step:08d}"  # whoever reads it finds all of it or nothing
                os.replace(self.path(step), going)
                shutil.rmtree(going)

    def undo_after(self, step: int) -> None:
        """Set later ones aside: the run goes back to ``step``, and a restart must not go on from what came after it."""
        for later in (number for number in self.steps() if number > step):
            shutil.rmtree(self.folder / f"undone_{later:08d}", ignore_errors=True)
            os.replace(self.path(later), self.folder / f"undone_{later:08d}")
        sync_write(self.folder / "latest", self.path(step).name + "\n")

    def newest_whole(self, set_aside: bool) -> tuple[Path, Saved] | None:
        """The newest checkpoint whose files are as they were written, and its content.

        Args:
            set_aside: rename damaged ones on the way, so that they never count again.
        """
        for step in reversed(self.steps()):
            try:
                return self.path(step), read_checkpoint(self.path(step))
            except Damaged as error:
                logger.warning("%s; falling back to the checkpoint before it", str(error).partition(";")[0])
                if set_aside:
                    os.replace(self.path(step), self.folder / f"damaged_{step:08d}")
        return None


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint.

    Args:
        weights: of the objective.
        optimizer: parameter name -> state.
        state: plain values: ``step``, ``data``, ``skipped`` ...
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state["step"])

    def fill(self, objective: nn.Module, where: Path, fingerprint: list[str]) -> None:
        """Fill an objective that is not spread out yet, and check that the rest fits it.

        Raises:
            InputError: the checkpoint is of another objective, or of a run over other data.
        """
        if self.state["data"] != fingerprint:
            raise InputError(
                f"{where}: data.train has changed since this checkpoint; start a new run (another run.dir)"
            )
        trained = {name for name, p in objective.named_parameters() if p.requires_grad}
        try:
            objective.load_state_dict(self.weights)
            if self.optimizer and set(self.optimizer) != trained:
                raise ValueError(f"optimizer state of {sorted(set(self.optimizer) ^ trained)[:5]}")
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{where}: does not fit this objective: {' '.join(str(error).split())}") from None


def read_checkpoint(folder: Path) -> Saved:
    """A checkpoint's content, after comparing checksums.

    Raises:
        InputError: it is not a checkpoint that this version reads.
        Damaged: a file differs from its checksum.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: not a checkpoint (no {MANIFEST}); allowed: RUN/checkpoints/step_XXXXXXXX")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        manifest = {MANIFEST: "not JSON"}
    for name, digest in manifest.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise Damaged(
                f"{folder / name}: damaged (checksum differs); resume from another checkpoint with --resume PATH"
            )
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise InputError(f"{folder}: checkpoint format {state['format']}, this version reads {FORMAT}")
    optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    return Saved(load_file(folder / WEIGHTS), optimizer, state)


def check_tensors(weights: dict[str, Tensor], what: str) -> None:
    """Refuse weights that are not numbers or not there.

    Raises:
        FloatingPointError: one is not finite.
        ValueError: one is empty, as the placeholders of sharded weights are.
    """
    empty, broken = unusable(weights)
    if empty:
        raise ValueError(f"{what}, empty tensors: {', '.join(empty[:5])}")
    if broken:
        raise FloatingPointError(f"{what}, not finite: {', '.join(broken[:5])}")
