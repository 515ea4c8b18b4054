"""Images that a text file lists."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ssl_vit.config import InputError
from ssl_vit.data.formats import printable
from ssl_vit.data.images import ImageFiles


class ListedImages(ImageFiles):
    """The files that a text file names, one a line: a path, and a TAB and its label if they have any.

    Paths start at the list's folder or at the root. Labels are class names, numbered in their sorted order, or, if all
    are, whole numbers below a million. A file that is not there is refused by name, like one that is no image.

    Args:
        file: the list.
        labels: ``"auto"``, or ``"none"`` to leave the labels out.
    """

    def __init__(self, file: Path, labels: str = "auto") -> None:
        try:
            lines = file.read_bytes().replace(b"\r\n", b"\n").split(b"\n")
        except OSError as error:
            raise InputError(f"list:{file}: cannot be read: {error.strerror}") from None
        rows = [(number, os.fsdecode(line).split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
        if not rows:
            raise InputError(f"list:{file}: names no images; write one path a line, with a TAB and a label or without")
        labelled = len(rows[0][1]) == 2
        for number, row in rows:
            if len(row) != 1 + labelled or not all(word.strip() for word in row):
                raise InputError(
                    f"list:{file}: line {number} is {printable(chr(9).join(row))!r}; allowed: a path, or a path, one "
                    "TAB and a label, all lines alike"
                )
        super().__init__(file.parent)
        self._files = [(row[0], *self._status(row[0])) for _, row in rows]
        words = [row[1] for _, row in rows] if labelled and labels != "none" else None
        if words and all(re.fullmatch(r"\d{1,6}", word, re.ASCII) for word in words):
            self.labels = [int(word) for word in words]
            self.classes: list[str] | None = list(map(str, range(max(self.labels) + 1)))
        else:
            self._classify(words)

    def _status(self, name: str) -> tuple[int, int]:
        try:
            status = (self.root / name).stat()
        except OSError:
            return -1, -1
        return status.st_size, status.st_mtime_ns
