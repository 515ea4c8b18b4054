"""Tiny shards, encoders and recipes that the tests share. Warnings of our own code are errors (pyproject.toml)."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
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
TINY_HYBRID: dict[str, Any] = {
    "name": "vit_tiny_r_s16_p8_224", "img_size": 32, "feature_patch_size": 2, "embed_dim": 48, "depth": 2,
    "num_heads": 3,
}  # fmt: skip
TINY_BEIT_ENCODER = {**TINY_ENCODER, "name": "beit_base_patch16_224"}
TINY_DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}


TINY_TOKENIZER = {"kind": "dvae", "codebook_size": 32, "code_dim": 8, "decoder_embed_dim": 16, "decoder_depth": 1}
TINY_VQKD = {
    **TINY_TOKENIZER, "kind": "vqkd", "decoder_embed_dim": 24, "decoder_num_heads": 2, "dead_below": 0.5,
}  # fmt: skip
TINY_BEIT = {"num_masked": 6, "min_block": 2}


@functools.cache
def _shared_folder() -> Path:
    """A folder for files that tests of several modules read; gone with the process."""
    folder = Path(tempfile.mkdtemp(prefix="ssl_vit_tests_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tokenizer_file(img_size: int = 32, patch_size: int = 8, in_chans: int = 3) -> dict[str, str]:
    """``objective.tokenizer`` of a small untrained tokenizer: a dVAE's, 32 codes."""
    from ssl_vit.encoders.base import create_encoder
    from ssl_vit.modules.dvae import DVAEQuantiser
    from ssl_vit.modules.tokenizer import EncoderTokenizer, save_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        sizes = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans}
        encoder = create_encoder(**{**TINY_ENCODER, **sizes})
        half = (0.5,) * in_chans
        tokenizer = EncoderTokenizer(encoder, DVAEQuantiser(encoder.token_dim, 32, 8), half, half)
        folder = _shared_folder() / f"tokenizer_{img_size}_{patch_size}_{in_chans}"
        return {"path": str(folder), "sha256": save_tokenizer(tokenizer, folder)["sha256"]}


@functools.cache
def teacher_folder(img_size: int = 32, patch_size: int = 8) -> str:
    """An export of ours with untrained weights and a normalisation of its own, to be a teacher."""
    from ssl_vit.encoders.base import create_encoder
    from ssl_vit.export.timm_folder import export_timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        encoder = create_encoder(**{**TINY_ENCODER, "img_size": img_size, "patch_size": patch_size, "embed_dim": 36})
        facts: dict[str, Any] = {"crop_pct": 1.0, "interpolation": "bicubic", "metadata": {}}
        folder = _shared_folder() / f"teacher_{img_size}_{patch_size}"
        export_timm(encoder, folder, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], **facts)
        return str(folder)


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


def write_shard(file: Path, count: int, cut: Collection[int] = ()) -> None:
    """A shard as others make them: dark and bright JPEGs, every tenth with the other's label; some ``cut`` in half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(zlib.crc32(file.name.encode()))
    with tarfile.open(file, "w") as tar:
        for i in range(count):
            picture = io.BytesIO()
            Image.fromarray(generator.integers(0, 128, (32, 32, 3), np.uint8) + 128 * (i % 2)).save(picture, "JPEG")
            image = picture.getvalue()[: picture.tell() // (2 if i in cut else 1)]
            for name, data in ((f"{i:03d}.jpg", image), (f"{i:03d}.cls", b"%d" % ((i + (i % 10 == 9)) % 2))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


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


def in_process(script: str | Path, *words: str) -> Any:
    """A pipeline in this process, for speed: what a process of its own would print, and its exit code."""
    stdout, stderr, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [str(script), *words]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def run_python(*words: str, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: int = 300) -> Any:
    """A command in this environment's Python, as a user's shell would start it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
