"""The built-in digits: scikit-learn's handwriting, real images that need no download."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

PARTS = ("digits", "digits-train", "digits-test")


class DigitImages:
    """1797 grey 8 x 8 digits as PNG, their 17 levels spread over 0..255.

    The test part is the last 20 % of each class in file order: writers come one after the other in the file, so few of
    them are in both parts.

    Args:
        part: one of :data:`PARTS`; ``digits`` is all of them.
        labels: ``"auto"``, or ``"none"`` to leave the labels out.
    """

    def __init__(self, part: str, labels: str = "auto") -> None:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        rank = np.empty(len(digits.target), dtype=np.int64)  # of a digit in its class
        for digit in range(10):
            of_class = np.flatnonzero(digits.target == digit)
            rank[of_class] = np.arange(len(of_class)) - round(0.8 * len(of_class))
        chosen = {"digits": rank >= rank.min(), "digits-train": rank < 0, "digits-test": rank >= 0}[part]
        self._numbers = np.flatnonzero(chosen)
        self._pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self._part = part
        self.classes = None if labels == "none" else [str(digit) for digit in range(10)]
        self.labels = [-1 if labels == "none" else int(digits.target[i]) for i in self._numbers]
        self.skipped: list[str] = []
        self.ignored: list[str] = []
        self.repeated: list[str] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, i: int) -> str:
        """The digit's number in scikit-learn's file."""
        return f"digits/{self._numbers[i]:04d}.png"

    def read(self, i: int) -> bytes:
        """The digit as PNG."""
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(self._pixels[self._numbers[i]]).save(file, "PNG")
        return file.getvalue()

    def fingerprint(self) -> str:
        """The part's name: the data never change."""
        return self._part
