"""The encoder as one safetensors file under timm's names, with all that a release keeps beside it if asked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ssl_vit.encoders.base import Encoder
from ssl_vit.export.reading import Reading, encoder_cases, reading
from ssl_vit.export.timm_folder import whole_state


def export_file(
    encoder: Encoder,
    file: Path,
    data: dict[str, Any],
    facts: Mapping[str, Any],
    beside: Mapping[str, Tensor] | None = None,
    fresh: bool = False,
) -> Reading:
    """Write a file whose metadata say, under ``config``, what config.json of a timm folder says; timm reads it again.

    Args:
        encoder: whole, any device and precision; written in float32.
        file: to write; it appears whole, after the check.
        data: ``mean, std, crop_pct, interpolation`` of the images.
        facts: kept in the metadata, such as ``license``.
        beside: what is not the encoder's: of a release's decoder or head.
        fresh: check it in a process of its own.

    Raises:
        ValueError: a tensor is empty or not finite.
        RuntimeError: what timm loads differs.
    """
    beside = beside or {}
    state = {**whole_state(encoder.model), **beside}
    architecture, arguments = encoder.timm_config()
    config = {
        "architecture": architecture,
        "model_args": arguments,
        "pretrained_cfg": {**data, "input_size": [encoder.in_chans, *encoder.img_size], **facts},
        "ssl_vit": {"encoder": encoder.config(), "data": data},
    }
    temporary = file.with_name(f".{file.name}.{os.getpid()}.safetensors")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()},
            temporary,
            metadata={"format": "pt", "config": json.dumps(config)},
        )
        found = reading("state_dict", temporary, encoder_cases(encoder), data, beside=beside.keys(), fresh=fresh)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
    return found
