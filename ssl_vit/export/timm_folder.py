"""The encoder as a timm folder: config.json and model.safetensors, which timm and transformers load by themselves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssl_vit.encoders.base import Encoder
from ssl_vit.encoders.files import unusable
from ssl_vit.export.reading import Reading, encoder_cases, reading

ABOUT_OTHER_WEIGHTS = ("tag", "url", "hf_hub_id", "origin_url", "paper_ids", "paper_name", "notes", "license")


def export_timm(
    encoder: Encoder,
    folder: str | Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float,
    interpolation: str,
    metadata: dict[str, Any],
    fresh: bool = False,
) -> Reading:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads, and check it there.

    The folder replaces an earlier one in one rename, after the check.

    Args:
        encoder: whole (not sharded), any device and precision; written in float32.
        folder: the folder to write.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        crop_pct: share of the shorter side kept by the centre crop.
        interpolation: resize filter of evaluations.
        metadata: plain facts kept in config.json under ``ssl_vit``; ``license`` also goes where timm looks for it.
        fresh: check it in a process of its own.

    Raises:
        ValueError: a tensor is empty or not finite, or mean and std do not fit the channels.
        RuntimeError: what timm loads differs from the encoder, its features by more than 1e-5.
    """
    folder = Path(folder)
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != encoder.in_chans:
            raise ValueError(f"{key}={list(values)}: should have one number for each of in_chans={encoder.in_chans}")
    data = {
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "crop_pct": float(crop_pct),
        "interpolation": interpolation,
    }
    facts = {**metadata, "encoder": encoder.config(), "data": data}
    with whole_folder(folder) as temporary:
        _write(encoder, temporary, data, facts)
        found = reading("timm", temporary, encoder_cases(encoder), data, fresh=fresh)
    return found


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The name of a folder to write, which takes the place of ``folder`` at the end, unless something is raised."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(encoder: Encoder, folder: Path, data: dict[str, Any], facts: dict[str, Any]) -> None:
    import timm
    from timm.models import save_for_hf

    folder.mkdir(parents=True)
    architecture, arguments = encoder.timm_config()
    model = timm.create_model(architecture, **arguments)
    model.load_state_dict(whole_state(encoder.model))
    data_config = {**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])}
    size = (encoder.in_chans, *encoder.img_size)
    save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": {"input_size": size}, "ssl_vit": facts},
        model_args=arguments,
        safe_serialization=True,
        data_config={**data_config, "input_size": size},
    )
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ABOUT_OTHER_WEIGHTS:
        config["pretrained_cfg"].pop(key, None)
    config["model_args"].pop("num_classes")  # stated beside it; transformers refuses it twice
    if "license" in facts:
        config["pretrained_cfg"]["license"] = facts["license"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors on the CPU, in float32.

    Raises:
        ValueError: one is empty or not finite.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    empty, broken = unusable(state)
    if empty:
        raise ValueError(f"not exported, tensors without elements (a partitioned model?): {', '.join(empty[:5])}")
    if broken:
        raise ValueError(f"not exported, tensors that are not finite: {', '.join(broken[:5])}")
    return state


def _replace(source: Path, target: Path) -> None:
    """Rename a folder onto another; the old one is out of the way only for the moment between two renames."""
    old = target.with_name(f".{target.name}.old.{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)
