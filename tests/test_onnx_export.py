"""ONNX: any batch size, equal features and tokens in onnxruntime, nothing left behind when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_BEIT_ENCODER, TINY_ENCODER, TINY_HYBRID, TINY_SWIN

from ssl_vit.encoders.base import create_encoder
from ssl_vit.export.onnx_file import export_onnx

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
DATA: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bicubic"}


@pytest.mark.parametrize("config", [TINY_ENCODER, TINY_HYBRID, TINY_SWIN, TINY_BEIT_ENCODER], ids=lambda c: c["name"])
def test_onnxruntime_gives_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(**config).eval()
    assert export_onnx(encoder, tmp_path / "encoder.onnx", DATA).difference <= 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"))
    image = torch.randn(5, 3, 32, 32)
    features, tokens = session.run(None, {"image": image.numpy()})
    assert features.shape == (5, encoder.embed_dim)
    expected = encoder(image)
    assert np.allclose(features, encoder.pool(expected).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert np.allclose(tokens, torch.cat(list(expected), dim=1).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map["crop_pct"] == "1.0"
