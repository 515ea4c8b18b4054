"""What a frozen network said of views that come again: computed once, then read from a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_vit.config import InputError


def state_hash(network: nn.Module) -> str:
    """The sha256 of a network's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TargetCache:
    """Targets of ``count`` recurring views, one record each in one file that all processes of a machine share.

    A run fills it as it comes past, so the first ``data.fixed_passes`` passes cost what they cost without it. The file
    is sparse until then. A look into it waits for the GPU, which is little beside a teacher's forward pass. Its folder
    is named by a hash of all that the targets depend on, so another teacher, view, seed or data set begins another
    file; ``key.json`` in it says which.

    Args:
        folder: of all caches.
        key: what the targets depend on; plain values.
        count: recurring views.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, key: dict[str, Any], count: int) -> None:
        text = json.dumps(key, sort_keys=True, indent=1, default=str) + "\n"
        self.path, self.count = folder / hashlib.sha256(text.encode()).hexdigest()[:16], count
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "key.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"objective.target_cache={folder}: {error}; give a folder that can be written") from None
        self.file = self.path / "targets.npy"
        self.records = self._opened()

    def get(self, places: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The targets of a batch.

        Args:
            places: int64 (B,), which recurring views these are; -1: one that does not recur.
            compute: gives the targets (B, ...) of the whole batch, always of the same shape and type, one of numpy's.

        Returns:
            What is stored if all of it is, else ``compute()``, which is stored.
        """
        wanted = places.cpu().numpy()
        if self.records is not None and (wanted >= 0).all() and (found := self.records[wanted])["done"].all():
            return torch.from_numpy(found["value"].copy()).to(places.device)
        values = compute()
        stored = values.cpu().numpy()
        if self.records is None:
            self._create(np.dtype([("value", stored.dtype, stored.shape[1:]), ("done", np.bool_)]))
            self.records = self._opened()
            assert self.records is not None
        found = np.empty(len(wanted), self.records.dtype)
        found["value"], found["done"] = stored, True
        self.records[wanted[wanted >= 0]] = found[wanted >= 0]
        return values

    def _opened(self) -> np.ndarray | None:
        return np.load(self.file, mmap_mode="r+") if self.file.exists() else None

    def _create(self, record: np.dtype) -> None:
        """The file of empty records, whole at once: other processes may be here too."""
        half = self.path / f"targets.{os.getpid()}.npy"
        np.lib.format.open_memmap(half, "w+", record, (self.count,)).flush()
        with contextlib.suppress(FileExistsError):
            os.link(half, self.file)
        half.unlink()
