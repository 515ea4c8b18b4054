"""Folders that appear whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssl_vit.config import InputError
from ssl_vit.data.index import INDEX


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a target that holds anything, except shards that are to be replaced.

    Raises:
        InputError: saying what stands in the way and how to go on.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder for the shards")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"{out}: is not empty; choose another folder, or replace its shards with overwrite=yes")
        if not (out / INDEX).exists():
            raise InputError(f"{out}: is not empty and holds no {INDEX}, so overwrite=yes does not delete it")


@contextmanager
def whole_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` at once if the block succeeds, and nothing if it fails."""
    prefix = f".{out.name}.packing-{socket.gethostname()}-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(out.parent, prefix)
        folder = out.parent / f"{prefix}{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    try:
        yield folder
        if overwrite and out.exists():
            old = out.parent / f"{prefix}{os.getpid()}-old"
            out.rename(old)
            folder.rename(out)
            shutil.rmtree(old)
        else:
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_overs(parent: Path, prefix: str) -> None:
    """Delete what a killed packing of the same target left behind."""
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        process = folder.name.removeprefix(prefix).partition("-")[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc").exists():
            shutil.rmtree(folder, ignore_errors=True)
