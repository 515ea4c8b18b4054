"""Counts of what was packed and refused, and the summary they make."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ssl_vit.data.checking import RESIZED_MODES, CheckedImage
from ssl_vit.data.formats import printable, say
from ssl_vit.data.images import Images, by_extension

_EDGES = (0, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048)  # pixels, of the bins of the histogram
_BINS = [*(f"{low}-{high - 1}" for low, high in pairwise(_EDGES)), f"{_EDGES[-1]}+"]


@dataclass
class Tally:
    """Counts over some images: refused as ``[name, reason]``, short sides by bins, bytes before and after resizing."""

    packed: int = 0
    refused: list[list[str]] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    short_sides: Counter[str] = field(default_factory=Counter)
    resized: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    def add(self, image: CheckedImage) -> None:
        """Count an image."""
        if image.reason:
            self.refused.append([image.name, image.reason])
            return
        self.packed += 1
        self.modes[image.mode] += 1
        self.short_sides[_BINS[bisect_right(_EDGES, min(image.height, image.width)) - 1]] += 1
        if image.resized_from:
            self.resized += 1
            self.bytes_before += image.resized_from[2]
            self.bytes_after += len(image.data)

    def update(self, other: Tally) -> None:
        """Count what another has counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Tally:
        """A tally from its attributes as JSON keeps them."""
        return cls(**{**values, "modes": Counter(values["modes"]), "short_sides": Counter(values["short_sides"])})

    def histogram(self) -> dict[str, int]:
        """Images by their short side in pixels, smallest first."""
        return {name: self.short_sides[name] for name in _BINS if self.short_sides[name]}


def print_summary(tally: Tally, images: Images, source: str, resize: int | None) -> None:
    """Say what was found, packed and refused."""
    found = tally.packed + len(tally.refused)
    say(f"{source}: found {found} images, packed {tally.packed}, refused {len(tally.refused)}")
    for name, reason in tally.refused[:5]:
        say(f"  refused  {name}: {reason}")
    for word in ("skipped", "ignored"):
        if names := getattr(images, word):
            say(f"  {word}  {by_extension([printable(name) for name in names])}")
    if names := [printable(name) for name in images.repeated]:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        say(f"  links    {', '.join(names[:5])}{more}: not followed, these folders are packed already")
    classes = images.classes or []
    first = ", ".join([*classes[:10], *(["..."] if len(classes) > 10 else [])])
    none = "none: unlabelled" if max(images.labels, default=-1) < 0 else "without names"
    say(f"  classes  {len(classes) or none} {first}".rstrip())
    say(f"  modes    {', '.join(f'{count} {mode}' for mode, count in tally.modes.most_common())}")
    sides = ", ".join(f"{count} of {name}" for name, count in tally.histogram().items())
    say(f"  sides    {sides} pixels (the shorter)")
    if resize:
        others = sum(count for mode, count in tally.modes.items() if mode not in RESIZED_MODES)
        share = f"{tally.bytes_after / tally.bytes_before:.0%} of their bytes" if tally.resized else "none was larger"
        say(
            f"  resized  {tally.resized} images to {resize} pixels, re-encoded as JPEG, which loses detail for good: "
            f"{tally.bytes_before / 1e6:.1f} -> {tally.bytes_after / 1e6:.1f} MB, {share}"
            + (f"; {others} others copied: modes that JPEG does not hold" if others else "")
        )
        say(
            f"           a crop of 20 % of the area then has about {0.2**0.5 * resize:.0f} pixels a side before it "
            "becomes a view of 224: prefer resize=384 to 512 for MAE and BEiT"
        )
