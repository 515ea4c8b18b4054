"""The encoder as an ONNX file: normalised images in, pooled features and tokens out, any batch size."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit.config import InputError
from ssl_vit.encoders.base import Encoder
from ssl_vit.export.reading import Reading, encoder_cases, reading
from ssl_vit.export.timm_folder import whole_state


class _Outputs(nn.Module):
    """timm's own forward, whose batch size stays free when it is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(image)  # (B, T, D); Swin: (B, h, w, D)
        return self.model.forward_head(tokens), tokens.flatten(1, -2)


def export_onnx(
    encoder: Encoder, file: Path, data: dict[str, Any], facts: Mapping[str, Any] | None = None, fresh: bool = False
) -> Reading:
    """Write ``features`` (B, D) and ``tokens`` (B, T, D) of ``image`` (B, C, H, W), and check it in onnxruntime.

    Args:
        encoder: whole, any device and precision; written in float32.
        file: to write; it appears whole, after the check.
        data: ``mean, std, crop_pct, interpolation`` of the images, kept in the file's metadata.
        facts: kept there too, such as ``license``.
        fresh: check it in a process of its own.

    Raises:
        InputError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: what onnxruntime loads differs, an output by more than 1e-5.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise InputError(f"format=onnx: needs {error.name}: bash scripts/setup.sh onnx") from None
    whole_state(encoder.model)  # refuses what is not whole
    cases = encoder_cases(encoder)
    model = _Outputs(copy.deepcopy(encoder.model).cpu().float().eval())
    temporary = file.with_name(f".{file.name}.{os.getpid()}.onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            torch.onnx.export(
                model, (cases["image"],), str(temporary), input_names=["image"], output_names=["features", "tokens"],
                dynamo=True, external_data=False, dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1)}},
                optimize=False,  # onnxruntime does when it loads, and the weights keep their names
                verbose=False,
            )  # fmt: skip
        described = onnx.load(str(temporary))
        stated = {**data, **(facts or {})}
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in stated.items()}
        onnx.helper.set_model_props(described, texts)
        onnx.checker.check_model(described)
        onnx.save(described, str(temporary))
        names = [f"model.{name}" for name, _ in encoder.model.named_parameters()]
        found = reading("onnx", temporary, cases, data, tensors=names, fresh=fresh)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
    return found
