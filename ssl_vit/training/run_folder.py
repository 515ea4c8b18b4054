"""The folder of a run: its recipe, environment, status and log, and the rule by which a run is resumed or refused."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from ssl_vit.config import InputError, plain, to_yaml
from ssl_vit.training.checkpoint import Checkpoints, Saved, read_checkpoint, sync_write
from ssl_vit.training.environment import FORMATTER, environment, timestamp

logger = logging.getLogger(__name__)

Complete = Callable[[dict[str, Any]], dict[str, Any]]

LOCK = ".lock"
_HELD: dict[Path, Any] = {}
"""Open lock files of this process."""


class RunFolder:
    """``RUN/`` as the contract of commands and files describes it.

    Args:
        path: of the folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def lock(self) -> None:
        """Hold the folder for this process's life, by its main process only; the system lets go when it ends.

        Raises:
            InputError: another live process holds it.
        """
        if os.environ.get("RANK", "0") != "0" or self.path.resolve() in _HELD:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        file = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            # a record lock: loader workers, which may outlive a killed process for a moment, do not inherit it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise Held(
                f"run.dir={self.path}: a live process is working in it ({holder}); wait for it, stop it, or give "
                "another run.dir"
            ) from None
        except OSError:  # a file system without locks
            logger.warning("run.dir=%s: its file system has no locks; do not start this run twice", self.path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        _HELD[self.path.resolve()] = file

    def check_resume(self, recipe: dict[str, Any], resume: str, complete: Complete) -> None:
        """Whether this recipe may start or go on in this folder; nothing is written.

        Args:
            recipe: the complete recipe as plain values.
            resume: ``"auto"``, ``"never"`` or the path of a checkpoint.
            complete: gives a recipe that an earlier version saved the keys that came later, at their defaults.

        Raises:
            InputError: the folder holds another run, or something that is no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"run.dir={self.path}: is a file; give the path of a folder")
        if not self.writable():
            raise InputError(f"run.dir={self.path}: cannot be written; give a folder below one that you may write to")
        if resume not in ("auto", "never"):
            folder = _named(resume)
            if not folder.is_dir():
                raise InputError(
                    f"--resume {resume}: no such folder; allowed: auto, never, RUN/checkpoints/step_XXXXXXXX"
                )
            self._compare(folder.parents[1] / "recipe.yaml", recipe, f"--resume {resume}", complete)
            return
        names = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        if not names - {"status.json", "train.log", LOCK}:
            return
        if resume == "never":
            raise InputError(f"run.dir={self.path}: is not empty and --resume is never; give another run.dir")
        if "recipe.yaml" not in names:
            raise InputError(
                f"run.dir={self.path}: is not empty and holds no run (no recipe.yaml); give another run.dir"
            )
        self._compare(self.path / "recipe.yaml", recipe, f"run.dir={self.path}", complete)

    def restore(self, resume: str, objective: nn.Module, fingerprint: list[str]) -> Saved | None:
        """Fill an objective from the checkpoint to go on from: the newest whole one, or the one that was named.

        Raises:
            InputError: the named one is damaged, or it does not fit.
        """
        if resume in ("auto", "never"):
            main = os.environ.get("RANK", "0") == "0"
            found = Checkpoints(self.checkpoints).newest_whole(set_aside=main)
            if found is None:
                return None
        else:
            folder = _named(resume)
            found = folder, read_checkpoint(folder)
        folder, saved = found
        saved.fill(objective, folder, fingerprint)
        if os.environ.get("RANK", "0") == "0" and folder.resolve().parent == self.checkpoints.resolve():
            Checkpoints(self.checkpoints).undo_after(saved.step)
        return saved

    @staticmethod
    def _compare(saved: Path, recipe: dict[str, Any], where: str, complete: Complete) -> None:
        if not saved.is_file():
            raise InputError(
                f"{where}: there is no {saved}, so the recipes cannot be compared; start with another run.dir"
            )
        values: Any = OmegaConf.to_container(OmegaConf.load(saved))
        before = _flat(complete(values))
        now = _flat(recipe)
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and not k.startswith("run."))
        if keys:
            changes = ", ".join(f"{key} (there {before.get(key)!r}, now {now.get(key)!r})" for key in keys)
            raise InputError(
                f"{where}: holds a run with another recipe; different: {changes}; "
                "give another run.dir, or the same values to resume"
            )

    def open(self, recipe: Any, facts: dict[str, Any]) -> None:
        """Create the folder and write recipe.yaml and environment.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        sync_write(self.path / "recipe.yaml", to_yaml(recipe))
        sync_write(self.path / "environment.json", json.dumps(environment() | facts, indent=1) + "\n")

    def status(self, state: str, step: int = 0, exit_code: int | None = None, message: str = "") -> None:
        """Write status.json; ``state`` is running, finished, preempted or failed."""
        self.path.mkdir(parents=True, exist_ok=True)
        line = {"state": state, "exit_code": exit_code, "step": step, "message": message, "time": timestamp()}
        sync_write(self.path / "status.json", json.dumps(line, indent=1) + "\n")

    def read_status(self) -> dict[str, Any]:
        """The last status, empty if there is none."""
        return self.read_json("status.json")

    def finished(self) -> bool:
        """Whether the folder holds a run that reached its end."""
        return self.read_status().get("state") == "finished" and (self.path / "result.json").is_file()

    def read_json(self, name: str) -> dict[str, Any]:
        """``RUN/name``, empty if it is not there."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def writable(self) -> bool:
        """Whether the folder can be made and written; nothing is left behind."""
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        try:
            # asking the system is not enough: root may write anywhere, and still not on a read-only disk
            with tempfile.TemporaryFile(dir=place):
                return True
        except OSError:
            return False

    def belongs_to_no_run(self) -> bool:
        """Whether a failed start may leave its status here without touching a run's."""
        return not (self.path / "recipe.yaml").exists() and (not self.path.exists() or self.path.is_dir())

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Replace ``RUN/name``."""
        sync_write(self.path / name, json.dumps(plain(values), indent=1) + "\n")

    def log_to_file(self) -> None:
        """Send the package's log to train.log too."""
        handler = logging.FileHandler(self.path / "train.log", encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(FORMATTER)
        self.close_log()
        logging.getLogger("ssl_vit").addHandler(handler)
        logging.getLogger("ssl_vit").setLevel(logging.INFO)

    @staticmethod
    def close_log() -> None:
        """Stop writing train.log, also that of a run that failed earlier in this process."""
        logger = logging.getLogger("ssl_vit")
        for handler in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
            logger.removeHandler(handler)
            handler.close()


def _named(resume: str) -> Path:
    folder = Path(resume)
    if folder.name == "latest" and folder.is_file():
        return folder.parent / folder.read_text(encoding="utf-8").strip()
    return folder


class Held(InputError):
    """The folder is in use: nothing in it may be touched."""

    untouched = True


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        merged: dict[str, Any] = {}
        for key, value in values.items():
            merged |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
        return merged
    return {prefix: values}
