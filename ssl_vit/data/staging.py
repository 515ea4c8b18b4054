"""Packing that may be killed at any moment: what is finished is kept beside the target, which appears whole or never.

``.OUT.packing/`` beside ``OUT``, shared by all processes that pack parts of it:

    plan.json                       what is packed, how, and in how many parts
    journal/part-0001-000000.json   a finished shard: counts, checksum, refused images; written last
    journal/part-0001-000000.npy    where its samples lie
    shards/part-0001-000000.tar     its bytes; ``shards`` is the folder that becomes ``OUT``
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_vit.config import InputError


class Record(NamedTuple):
    """A finished shard. The last of a part may have no samples, and then no file."""

    stop: int  # the first position of the order that is not in it
    filesize: int
    sha256: str
    tally: dict[str, Any]  # see ssl_vit.data.tally


class Staging:
    """The folder in which shards wait until all are there.

    Args:
        out: the target.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.parent / f".{out.name}.packing"
        self.shards = self.folder / "shards"
        self._journal = self.folder / "journal"

    def open(self, plan: dict[str, Any]) -> None:
        """Begin, or go on with what was begun under the same plan.

        Args:
            plan: whatever decides what is written; ``parts`` and ``found`` cut the order.

        Raises:
            InputError: the folder cannot be made, or holds something else that is not finished.
        """
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            if self.folder.exists() and not self.shards.exists():  # finished, but killed before it was removed
                shutil.rmtree(self.folder)
            if not self.folder.exists():
                self._create(plan)
            known = self.plan
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written: {error.strerror}") from None
        if differing := [key for key, value in plan.items() if known.get(key) != value]:
            changes = ", ".join(f"{key} {known.get(key)!r} -> {plan[key]!r}" for key in differing)
            raise InputError(
                f"{self.out}: an unfinished packing of it is in {self.folder}, but of something else ({changes}); give "
                "the same source and options to go on, or remove that folder to begin anew"
            )

    def _create(self, plan: dict[str, Any]) -> None:
        new = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}-", dir=self.out.parent))
        (new / "journal").mkdir()
        (new / "shards").mkdir()
        (new / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        try:
            new.rename(self.folder)
        except OSError:  # another part was first
            shutil.rmtree(new)
            if not self.folder.exists():
                raise

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What is being packed."""
        return json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))

    def span(self, part: int) -> range:
        """The positions of a part, counted from 1."""
        found, parts = self.plan["found"], self.plan["parts"]
        return range((part - 1) * found // parts, part * found // parts)

    def missing(self) -> list[int]:
        """The parts that are not finished."""
        last = {part: self.finished(part)[-1:] for part in range(1, self.plan["parts"] + 1)}
        return [part for part, records in last.items() if not records or records[0].stop != self.span(part).stop]

    def tar(self, part: int, number: int) -> Path:
        """The file of a part's shard until all shards are there."""
        return self.shards / f"part-{part:04d}-{number:06d}.tar"

    def finished(self, part: int) -> list[Record]:
        """What is known of a part's finished shards."""
        records: list[Record] = []
        while (file := self._entry(part, len(records), "json")).exists():
            records.append(Record(**json.loads(file.read_text(encoding="utf-8"))))
        return records

    def samples(self, part: int, number: int) -> np.ndarray:
        """The SAMPLE records of a finished shard."""
        return np.load(self._entry(part, number, "npy"))

    def commit(self, part: int, number: int, record: Record, samples: np.ndarray) -> None:
        """Note that a shard is finished."""
        np.save(self._entry(part, number, "npy"), samples)
        entry = self._entry(part, number, "json")
        temporary = entry.with_suffix(".tmp")
        temporary.write_text(json.dumps(record._asdict()), encoding="utf-8")
        os.replace(temporary, entry)

    def _entry(self, part: int, number: int, kind: str) -> Path:
        return self._journal / f"part-{part:04d}-{number:06d}.{kind}"

    @contextmanager
    def claimed(self, part: int) -> Iterator[None]:
        """Keep others from packing the same part.

        Raises:
            InputError: another process packs it.
        """
        with (self._journal / f"part-{part:04d}.lock").open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by workers
            except BlockingIOError:
                which = f"part {part} of it" if self.plan["parts"] > 1 else "it"
                raise InputError(f"{self.out}: another process is packing {which}; wait for its end") from None
            except OSError:  # a file system without locks: two would write the same bytes
                pass
            yield

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Let one process at a time see whether all is there and finish it; False if another has done so."""
        try:
            file = (self._journal / "finish.lock").open("w")
        except FileNotFoundError:
            yield False
            return
        with file:
            with suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_EX)
            yield self.shards.exists()

    def publish(self) -> None:
        """Let the shards take the target's place, and remove what is left."""
        if self.out.exists() and any(self.out.iterdir()):
            self.out.rename(self.folder / "replaced")
        self.shards.rename(self.out)
        self.remove()

    def remove(self) -> None:
        """Forget all that was packed."""
        shutil.rmtree(self.folder, ignore_errors=True)


def unfinished(out: Path) -> str:
    """What is missing of a folder that is being packed; an empty string if it is not."""
    staging = Staging(out)
    if not staging.shards.exists():
        return ""
    missing, parts = staging.missing(), staging.plan["parts"]
    if parts == 1:
        what = "it is not finished; give the same pipelines/pack.py command again to go on"
    elif missing:
        what = f"{some_parts(missing, parts)} missing; pack them with part=I/{parts}"
    else:
        what = "all parts are there, but not put together; give any part's pipelines/pack.py command again"
    return f"{out}: is being packed in {staging.folder}: {what}"


def some_parts(missing: list[int], parts: int) -> str:
    """``part 3 of 8 is`` or ``parts 1, 2, 5 of 8 are``."""
    names = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
    return f"part {names} of {parts} is" if len(missing) == 1 else f"parts {names} of {parts} are"
