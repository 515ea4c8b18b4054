"""The exported encoder is the trained one, in plain timm and where ssl_vit cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT

from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.weights import encoder_config, fill_encoder
from ssl_vit.export.timm_folder import export_timm

TINY: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}
VARIANTS = [
    {},
    {"in_chans": 1, "img_size": [32, 48]},
    {"global_pool": "avg"},
    {"class_token": False, "global_pool": "avg"},
]


def export(folder: Path, **config: Any) -> tuple[Any, float]:
    torch.manual_seed(0)
    encoder = create_encoder(**{**TINY, **config}).eval()
    mean = [0.1 * (i + 1) for i in range(encoder.in_chans)]
    difference = export_timm(
        encoder, folder, mean=mean, std=mean, crop_pct=0.9, interpolation="bilinear", metadata={"step": 5}
    )
    return encoder, difference


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_features_are_equal_in_timm(tmp_path: Path, config: dict[str, Any]) -> None:
    encoder, difference = export(tmp_path / "encoder", **config)
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    image = torch.randn(2, encoder.in_chans, *encoder.img_size)
    with torch.no_grad():
        found, expected = model(image), encoder.pool(encoder(image))
    assert difference <= 1e-5
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5
    settings = timm.data.resolve_model_data_config(model)
    assert settings["mean"] == pytest.approx([0.1 * (i + 1) for i in range(encoder.in_chans)])
    assert settings["input_size"] == (encoder.in_chans, *encoder.img_size)
    assert (settings["crop_pct"], settings["interpolation"]) == (0.9, "bilinear")
    assert model.num_classes == 0


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_an_export_builds_its_encoder_again(tmp_path: Path, config: dict[str, Any]) -> None:
    encoder, _ = export(tmp_path / "encoder", **config)
    stated = encoder_config(tmp_path / "encoder")
    assert stated.pop("data")["crop_pct"] == 0.9
    again = create_encoder(**stated)
    fill_encoder(again, tmp_path / "encoder")
    image = torch.randn(2, encoder.in_chans, *encoder.img_size)
    with torch.no_grad():
        assert torch.equal(again.eval()(image).patches, encoder(image).patches)


def test_loads_where_ssl_vit_is_not(tmp_path: Path) -> None:
    encoder, _ = export(tmp_path / "encoder")
    image = torch.randn(2, 3, 32, 32)
    torch.save(image, tmp_path / "image.pt")
    script = (
        "import sys, torch\n"
        f"root = {str(ROOT)!r}\n"
        "sys.path = [p for p in sys.path if p and p != root and not p.startswith(root + '/ssl_vit')]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "try:\n    import ssl_vit\nexcept ImportError:\n    pass\nelse:\n    sys.exit('ssl_vit is importable')\n"
        "import timm\n"
        f"encoder = timm.create_model('local-dir:{tmp_path}/encoder', pretrained=True).eval()\n"
        f"torch.save(encoder(torch.load('{tmp_path}/image.pt')).detach(), '{tmp_path}/out.pt')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = encoder.pool(encoder(image)).detach()
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-5, atol=1e-5)


def test_broken_weights_are_not_exported(tmp_path: Path) -> None:
    encoder, _ = export(tmp_path / "encoder")
    before = (tmp_path / "encoder" / "model.safetensors").read_bytes()
    with torch.no_grad():
        encoder.model.norm.weight[0] = float("inf")
    mean = (0.5,) * 3
    with pytest.raises(ValueError, match=r"not finite: norm\.weight"):
        export_timm(
            encoder, tmp_path / "encoder", mean=mean, std=mean, crop_pct=1, interpolation="bicubic", metadata={}
        )
    encoder.model.norm.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match=r"without elements.*norm\.weight"):
        export_timm(
            encoder, tmp_path / "encoder", mean=mean, std=mean, crop_pct=1, interpolation="bicubic", metadata={}
        )
    assert (tmp_path / "encoder" / "model.safetensors").read_bytes() == before, "the old export is untouched"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder"]


def test_config_is_plain(tmp_path: Path) -> None:
    export(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["ssl_vit"]["step"] == 5
    assert config["num_classes"] == 0
