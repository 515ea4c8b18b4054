"""Tiny shards, encoders and recipes that the tests share. Warnings of our own code are errors (pyproject.toml)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_vit.objectives

ROOT = Path(__file__).resolve().parents[1]
ssl_vit.objectives.__path__.append(str(ROOT / "tests" / "parts"))  # objectives that only tests use
SHARED_DATA = ROOT.parent / "shared" / "data"
TINY_ENCODER = {
    "name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
}  # fmt: skip
TINY_SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224", "img_size": 32, "first_patch_size": 2, "window_size": 4, "embed_dim": 24,
    "depths": [2, 2], "num_heads": [2, 4],
}  # fmt: skip
TINY_DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed sources go to a folder of this test session, shared by its tests."""
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_images(folder: Path, classes: int = 2, per_class: int = 20, size: int = 32, suffix: str = "png") -> Path:
    """Class folders of small noisy pictures, each class with a colour of its own."""
    generator = np.random.default_rng(0)
    for c in range(classes):
        target = folder / f"class_{c}"
        target.mkdir(parents=True, exist_ok=True)
        colour = np.array([(c * 70) % 256, (c * 130 + 40) % 256, (c * 30 + 90) % 256])
        for i in range(per_class):
            pixels = (colour + generator.integers(0, 90, (size, size, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(target / f"{i:04d}.{suffix}")
    return folder


def tiny_teacher(folder: Path, num_classes: int = 3, in_chans: int = 3) -> dict[str, Any]:
    """A ``teacher`` section: a small CNN of timm with random weights, in a file."""
    import timm

    model = timm.create_model("resnet10t", num_classes=num_classes, in_chans=in_chans)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "teacher.pth")
    return {
        "name": "resnet10t",
        "weights": str(folder / "teacher.pth"),
        "img_size": 32,
        "mean": [0.5] * in_chans,
        "std": [0.5] * in_chans,
    }


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled folder of 3 x 24 pictures of 32 x 32 pixels."""
    return write_images(tmp_path_factory.mktemp("images"), classes=3, per_class=24)


def tiny_recipe(images: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    """A MAE recipe of a few seconds: 72 images, batches of 16, 4.5 steps an epoch."""
    recipe: dict[str, Any] = {
        "seed": 0,
        "mixed_precision": "no",
        "objective": {"name": "mae", **TINY_DECODER},
        "encoder": dict(TINY_ENCODER),
        "data": {"train": f"folder:{images}", "val": f"folder:{images}", "crop_pct": 1.0, "num_lanes": 8, "window": 8},
        "optim": {
            "batch_size": 16,
            "epochs": "12 steps",
            "base_lr": 1e-3,
            "lr_divisor": None,
            "warmup_epochs": "3 steps",
        },
        "evals": {},
        "run": {"dir": str(folder), "workers": 0, "log_every": 1, "save_every": "4 steps", "tensorboard": False},
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            recipe[section][name] = value
        else:
            recipe[section] = value
    return recipe


def run_python(*words: str, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: int = 300) -> Any:
    """A command in this environment's Python, as a user's shell would start it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
