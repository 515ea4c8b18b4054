"""Checkpoints: a folder a step, written beside its final name and renamed, so that a half one never has that name.

    RUN/checkpoints/step_00001234/  objective.safetensors  optimizer.pt  state.json  manifest.json
    RUN/checkpoints/latest          the name of the newest, a text file

Nothing random is saved: order, views, masks and the generators of a step are functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ssl_vit.config import InputError

FORMAT = 1
WEIGHTS, OPTIMIZER, STATE, MANIFEST = "objective.safetensors", "optimizer.pt", "state.json", "manifest.json"


def sync_write(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step that a crash cannot halve."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

    def save(self, step: int, objective: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
        """Write one checkpoint, point ``latest`` at it, then delete what is no longer kept.

        Raises:
            FloatingPointError: a weight is not finite; nothing was written.
        """
        weights = {name: tensor.detach().contiguous() for name, tensor in objective.state_dict().items()}
        broken = [name for name, t in weights.items() if t.is_floating_point() and not t.isfinite().all()]
        if broken:
            raise FloatingPointError(f"step {step}: not saved, not finite: {', '.join(broken[:5])}")
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".writing_{step:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(weights, temporary / WEIGHTS)
        torch.save(optimizer.state_dict(), temporary / OPTIMIZER)
        sync_write(temporary / STATE, json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
        names = (WEIGHTS, OPTIMIZER, STATE)
        for name in names:
            with open(temporary / name, "rb+") as file:
                os.fsync(file.fileno())
        sync_write(temporary / MANIFEST, json.dumps({name: file_sha256(temporary / name) for name in names}, indent=1))
        shutil.rmtree(self.path(step), ignore_errors=True)
        os.replace(temporary, self.path(step))
        sync_write(self.folder / "latest", self.path(step).name + "\n")
        self._prune(step)
        return self.path(step)

    def _prune(self, newest: int) -> None:
        kept = set(self.steps()[-self.keep_last :]) | {newest}
        for step in self.steps():
            if step not in kept and not self.keep(step):
                shutil.rmtree(self.path(step))

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Weights, optimizer state and run state of a checkpoint, after comparing checksums.

    Raises:
        InputError: it is not a whole checkpoint, or a file differs from its checksum.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: not a checkpoint (no {MANIFEST}); allowed: RUN/checkpoints/step_XXXXXXXX")
    for name, digest in json.loads((folder / MANIFEST).read_text(encoding="utf-8")).items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise InputError(
                f"{folder / name}: damaged (checksum differs); resume from another checkpoint with --resume PATH"
            )
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise InputError(f"{folder}: checkpoint format {state['format']}, this version reads {FORMAT}")
    optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    return load_file(folder / WEIGHTS), optimizer, state


def restore(folder: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: list[str]) -> int:
    """Fill objective and optimizer from a checkpoint of this run; returns the number of steps done.

    Raises:
        InputError: it is damaged, of another objective, or of a run over other data.
    """
    weights, optimizer_state, state = read_checkpoint(folder)
    if state["data"] != fingerprint:
        raise InputError(f"{folder}: data.train has changed since this checkpoint; start a new run (another run.dir)")
    try:
        objective.load_state_dict(weights)
        optimizer.load_state_dict(optimizer_state)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{folder}: does not fit this objective: {' '.join(str(error).split())}") from None
    return int(state["step"])
