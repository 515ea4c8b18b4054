"""The encoder as an ONNX file: normalised images in, pooled features and tokens out, any batch size."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit.config import InputError
from ssl_vit.encoders.base import Encoder
from ssl_vit.export.timm_folder import TOLERANCE, whole_state


class _Outputs(nn.Module):
    """timm's own forward, whose batch size stays free when it is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(image)  # (B, T, D); Swin: (B, h, w, D)
        return self.model.forward_head(tokens), tokens.flatten(1, -2)


def export_onnx(encoder: Encoder, file: Path, data: dict[str, Any]) -> float:
    """Write ``features`` (B, D) and ``tokens`` (B, T, D) of ``image`` (B, C, H, W), and check it in onnxruntime.

    Args:
        encoder: whole, any device and precision; written in float32.
        file: to write; it appears whole, after the check.
        data: ``mean, std, crop_pct, interpolation`` of the images, kept in the file's metadata.

    Returns:
        The largest difference of a feature or token, relative to the largest, over batches of 1 and 3.

    Raises:
        InputError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: the outputs differ by more than 1e-5.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise InputError(f"format=onnx: needs {error.name}: pip install 'ssl_vit[onnx]'") from None
    whole_state(encoder.model)
    own = copy.deepcopy(encoder).cpu().float().eval()
    model = _Outputs(own.model)
    generator = torch.Generator().manual_seed(0)
    shape = (encoder.in_chans, *encoder.img_size)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            torch.onnx.export(
                model, (torch.randn(2, *shape, generator=generator),), str(temporary),
                input_names=["image"], output_names=["features", "tokens"], dynamo=True, external_data=False,
                dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1)}}, verbose=False,
            )  # fmt: skip
        described = onnx.load(str(temporary))
        onnx.helper.set_model_props(described, {key: str(value) for key, value in data.items()})
        onnx.checker.check_model(described)
        onnx.save(described, str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        worst = 0.0
        for count in (1, 3):
            image = torch.randn(count, *shape, generator=generator)
            with torch.no_grad():
                found = own(image)
                expected = own.pool(found), torch.cat(list(found), dim=1)
            for ours, theirs in zip(expected, session.run(None, {"image": image.numpy()}), strict=True):
                worst = max(worst, float((torch.from_numpy(theirs) - ours).abs().max() / ours.abs().max()))
        if not worst <= TOLERANCE:
            raise RuntimeError(f"{file}: not exported, onnxruntime differs by {worst:.1e} (allowed: {TOLERANCE:.0e})")
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
    return worst
