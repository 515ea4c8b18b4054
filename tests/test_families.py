"""Every family of encoders in the objectives that allow it: it learns, resumes bit for bit, is probed and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TINY_BEIT_ENCODER, TINY_DECODER, TINY_ENCODER, TINY_HYBRID, TINY_SWIN, tiny_recipe
from test_trainer import losses, train

from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.weights import encoder_config, fill_encoder

SIMMIM = {"name": "simmim", "mask_unit": 8}
MAE = {"name": "mae", **TINY_DECODER}
IBOT = {"name": "ibot", "out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 8, "local_crops": 1, "local_size": 16}
SUPERVISED = {"name": "classification", "head_std": 0.0}
TINY_RESNET = {"name": "resnet18", "img_size": 32, "channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit-simmim": (TINY_ENCODER, SIMMIM),
    "swin-simmim": (TINY_SWIN, SIMMIM),
    "swin-supervised": (TINY_SWIN, SUPERVISED),
    "hybrid-mae": (TINY_HYBRID, MAE),
    "hybrid-simmim": (TINY_HYBRID, SIMMIM),
    "hybrid-ibot": (TINY_HYBRID, IBOT),
    "hybrid-supervised": (TINY_HYBRID, SUPERVISED),
    "beit-simmim": (TINY_BEIT_ENCODER, SIMMIM),
    "beit-supervised": (TINY_BEIT_ENCODER, SUPERVISED),
    "resnet-supervised": (TINY_RESNET, SUPERVISED),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_whole_run(pair: str, images: Path, tmp_path: Path) -> None:
    encoder, objective = PAIRS[pair]
    values = tiny_recipe(
        images, tmp_path / "run", objective=dict(objective), evals={"knn": {"k": [5]}, "linear": {}, "rank": {}},
        optim__epochs="40 steps",
    )  # fmt: skip
    values["encoder"] = dict(encoder)
    values["run"] |= {"save_every": "20 steps", "keep_last": 3}
    folder = train(values)
    found = [loss for _, loss in losses(folder)]
    if objective is not IBOT:  # whose targets move with it
        assert sum(found[-5:]) < 0.95 * sum(found[:5])
    values["run"] |= {"dir": str(tmp_path / "again")}
    again = train(values, resume=str(folder / "checkpoints" / "step_00000020"))
    assert losses(again) == losses(folder)[20:]
    exported = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True).eval()
    config = encoder_config(folder)
    config.pop("data")
    ours = create_encoder(**config).eval()
    fill_encoder(ours, folder)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(exported(image), ours.pool(ours(image)), rtol=1e-5, atol=1e-5)
