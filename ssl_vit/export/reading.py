"""The proof of an export: it is loaded by the library it is made for, and all that comes back is compared."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ssl_vit.encoders.base import Encoder
from ssl_vit.export import readers

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Reading:
    """What an export gave when it was loaded.

    Attributes:
        reader: class and library.
        difference: the largest one of any output, relative to the output's largest value.
        outputs: their names.
        tensors: number in the export.
        beside: those that this reader has no place for.
        pixels: preprocessing as the reader finds it.
        fresh: whether it was loaded in a process of its own, without ssl_vit.
    """

    reader: str
    difference: float
    outputs: tuple[str, ...]
    tensors: int
    beside: tuple[str, ...]
    pixels: dict[str, Any]
    fresh: bool

    def facts(self) -> dict[str, str]:
        """What a person should know, by its name."""
        where = " in a process without ssl_vit" if self.fresh else ""
        groups = dict.fromkeys(name.partition(".")[0] for name in self.beside)
        rest = f"; for the release's own code: {len(self.beside)} ({', '.join(groups)})" if self.beside else ""
        return {
            "reloaded": f"as {self.reader}{where}",
            "largest difference": f"{self.difference:.1e} of the largest value ({', '.join(self.outputs)})",
            "tensors": f"{self.tensors - len(self.beside)} loaded, none missing, none unknown{rest}",
            "preprocessing": ", ".join(f"{key} {value}" for key, value in self.pixels.items()),
        }


def encoder_cases(encoder: Encoder) -> dict[str, Tensor]:
    """Three random images, and the features and tokens of an encoder in float32."""
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    image = torch.randn(3, encoder.in_chans, *encoder.img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        tokens = encoder(image)
        return {"image": image, "features": encoder.pool(tokens), "tokens": torch.cat(list(tokens), dim=1)}


def reading(
    kind: str,
    path: Path,
    cases: dict[str, Tensor],
    data: Mapping[str, Any],
    *,
    beside: Collection[str] = (),
    tensors: Collection[str] = (),
    fresh: bool = False,
) -> Reading:
    """Load an export and compare outputs, tensors and preprocessing.

    Args:
        kind: format of the export.
        path: of the folder or file.
        cases: images and outputs, see :func:`ssl_vit.export.readers.read`.
        data: ``mean, std, crop_pct, interpolation`` that it should state.
        beside: tensors that the reader has no place for.
        tensors: that should be in it, where the reader has no list of its own.
        fresh: load it in a process of its own, in which ssl_vit cannot be imported.

    Raises:
        RuntimeError: it cannot be loaded, or anything differs: an output by more than 1e-5 of its largest value.
    """
    found = _in_a_fresh_process(kind, path, cases) if fresh else readers.read(kind, path, cases)
    differences = found["differences"]
    worst = max(differences, key=differences.__getitem__)
    if not differences[worst] <= TOLERANCE:
        raise RuntimeError(
            f"not exported: its {worst} as {found['reader']} differ by {differences[worst]:.1e} from the encoder's "
            f"(relative; allowed: {TOLERANCE:.0e})"
        )
    missing = found["missing"] + [name for name in tensors if name not in found["names"]]
    unknown = sorted(set(found["unexpected"]) ^ set(beside))
    if missing or unknown:
        raise RuntimeError(f"not exported: {found['reader']} misses {missing[:5]} and does not know {unknown[:5]}")
    pixels, shape = found["pixels"], list(cases["image"].shape[1:])
    side = min(shape[1:])
    if (
        any(list(pixels[key]) != list(data[key]) for key in ("mean", "std", "interpolation"))
        or abs(side / pixels["crop_pct"] - side / data["crop_pct"]) > 0.5  # pixels
        or list(pixels["size"]) != shape
    ):
        raise RuntimeError(f"not exported: {found['reader']} finds the preprocessing {pixels}, not {dict(data)}")
    return Reading(
        found["reader"], differences[worst], tuple(differences), len(found["names"]), tuple(beside), pixels, fresh
    )


def _in_a_fresh_process(kind: str, path: Path, cases: dict[str, Tensor]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "cases.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in cases.items()}, stored)
        words = [sys.executable, "-P", str(readers.__file__), kind, str(path), str(stored)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"not exported, it cannot be loaded: {(done.stderr.splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
