"""Exports for transformers: its own classes, tensors accounted for, tokens and losses equal after loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_BEIT_ENCODER, TINY_ENCODER, TINY_HYBRID, TINY_SWIN, tiny_recipe
from safetensors.torch import load_file
from test_families import TINY_RESNET
from test_trainer import train

from ssl_vit.config import InputError
from ssl_vit.encoders.base import Encoder, create_encoder
from ssl_vit.export.command import ExportOptions, export
from ssl_vit.export.transformers_folder import export_transformers

transformers = pytest.importorskip("transformers")
DATA = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "crop_pct": 0.875, "interpolation": "bicubic"}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "vit": (TINY_ENCODER, "ViTModel"),
    "vit-rows-and-columns": ({**TINY_ENCODER, "pos_embed": "learned2d", "img_size": (16, 40)}, "ViTModel"),
    "vit-grey": ({**TINY_ENCODER, "in_chans": 1, "pos_embed": "learned", "mlp_ratio": 2.0}, "ViTModel"),
    "deit": ({**TINY_ENCODER, "name": "deit_tiny_distilled_patch16_224"}, "DeiTModel"),
    "beit-shared": (TINY_BEIT_ENCODER, "BeitModel"),
    "beit-layer": ({**TINY_BEIT_ENCODER, "rel_pos": "layer", "layer_scale": 1e-5}, "BeitModel"),
    "beit-absolute": ({**TINY_BEIT_ENCODER, "rel_pos": "none", "abs_pos": True, "layer_scale": 0.0}, "BeitModel"),
    "swin": (TINY_SWIN, "SwinModel"),
    "swin-shifted": ({**TINY_SWIN, "img_size": 64}, "SwinModel"),
}


def made(config: dict[str, Any]) -> Encoder:
    torch.manual_seed(0)
    encoder = create_encoder(**config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    return encoder


@pytest.mark.parametrize("model", MODELS)
def test_the_loaded_class_is_transformers_own(model: str, tmp_path: Path) -> None:
    config, name = MODELS[model]
    encoder = made(config)
    assert export_transformers(encoder, tmp_path / "out", DATA).difference <= 1e-5
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    assert type(loaded) is getattr(transformers, name)
    size = encoder.img_size
    picture = torch.randn(3, encoder.in_chans, *size)
    found = loaded(picture).last_hidden_state
    expected = torch.cat(list(encoder(picture)), dim=1)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    stated = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert stated["crop_size"] == {"height": size[0], "width": size[1]}


def test_the_image_processor_is_our_evaluation(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from ssl_vit.data.loader import Pixels
    from ssl_vit.data.views import CentreView

    export_transformers(made(TINY_ENCODER), tmp_path / "out", DATA)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    ramp = np.linspace(0, 255, 60 * 80).reshape(60, 80)
    pixels = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=2).astype(np.uint8)
    found = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    view = CentreView((32, 32), 0.875, "bicubic")({"image": torch.from_numpy(pixels).permute(2, 0, 1), "label": 0})
    normalise = Pixels((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).to_device
    expected = normalise({"image": view["image"][None]}, torch.device("cpu"))["image"]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.2, "within a few steps of 8-bit pixels over the smallest std"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINY_HYBRID, "a hybrid; transformers has none"),
        (TINY_RESNET, "transformers has no class for it"),
        ({**TINY_ENCODER, "class_token": False, "global_pool": "avg"}, "class_token=false"),
        ({**TINY_ENCODER, "global_pool": "avg", "fc_norm": True}, "no norm behind the pooling"),
        ({**TINY_ENCODER, "name": "vit_small_patch14_reg4_dinov2"}, "without place there: .*reg_token"),
    ],
    ids=str,
)
def test_what_transformers_cannot_compute_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_transformers(made(config), tmp_path / "out", DATA)
    assert not list(tmp_path.iterdir())


def test_a_run_as_a_whole(images: Path, tmp_path: Path) -> None:
    run = train(tiny_recipe(images, tmp_path / "run"))
    export(run / "checkpoints" / "step_00000012", tmp_path / "mae", ExportOptions(format="vit_mae"), fresh=False)
    loaded = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "mae")
    assert type(loaded) is transformers.ViTMAEForPreTraining
    export(run, tmp_path / "official.safetensors", ExportOptions(format="official"), fresh=False)
    official = load_file(tmp_path / "official.safetensors")
    assert {"cls_token", "blocks.1.attn.qkv.weight", "decoder_blocks.0.mlp.fc1.bias", "mask_token"} <= official.keys()
    whole = load_file(run / "checkpoints" / "step_00000012" / "objective.safetensors")
    assert {name.removeprefix("encoder.model.") for name in whole} == official.keys()
    again = tiny_recipe(images, tmp_path / "again", optim__epochs="1 steps", optim__warmup_epochs=0)
    again["objective"]["init"] = str(tmp_path / "official.safetensors")
    train(again)
    supervised = train(tiny_recipe(images, tmp_path / "other", objective={"name": "classification"}))
    for kind, allowed in (("vit_mae", "runs of mae"), ("official", "runs of mae, beit")):
        with pytest.raises(InputError, match=f"format={kind}: objective.name='classification'; allowed: {allowed}"):
            export(supervised, tmp_path / "nothing", ExportOptions(format=kind))
    shutil.copytree(run / "encoder", tmp_path / "alone" / "deeper" / "encoder")
    with pytest.raises(InputError, match=r"no recipe\.yaml tells what was trained"):
        export(tmp_path / "alone" / "deeper" / "encoder", tmp_path / "nothing", ExportOptions(format="official"))
    assert not (tmp_path / "nothing").exists()
