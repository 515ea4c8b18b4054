"""Where the weights of a run, an export or a foreign file lie, what they say of themselves, under clean names."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssl_vit.config import InputError
from ssl_vit.config import load as load_yaml
from ssl_vit.encoders.base import encoder_class_of
from ssl_vit.encoders.timm_models import DATA_KEYS, TIMM_ARGUMENTS, fetched, published, published_config, timm_facts
from ssl_vit.encoders.transformers_layout import encoder_arguments, is_transformers, stated_pixels, timm_names

CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "teacher")
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COMMON_PREFIXES = ("encoder.", "backbone.", "model.")
OTHER_TIMM_ARGUMENTS = (
    "global_pool", "fc_norm", "num_classes", "drop_rate", "drop_path_rate",
    "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias",
)  # fmt: skip


def find_weights(path: str | Path, whole: bool = False) -> Path:
    """The file with the weights: ``path`` itself, or in a timm folder, a checkpoint or a run.

    Args:
        path: a file or folder.
        whole: of a run, the newest checkpoint (all of the objective) and not the exported encoder.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    if path.is_file() or published(path):
        return path
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    candidates = [path / "encoder" / "model.safetensors", path / "model.safetensors", path / "pytorch_model.bin"]
    checkpoints = [path / "objective.safetensors"]
    latest = path / "checkpoints" / "latest"
    if latest.is_file():
        checkpoints.append(latest.parent / latest.read_text(encoding="utf-8").strip() / "objective.safetensors")
    candidates = checkpoints + candidates if whole else candidates + checkpoints
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{path}: holds no weights; allowed: a run folder, a checkpoint (RUN/checkpoints/step_XXXXXXXX), a timm folder "
        "(config.json and model.safetensors), or a file"
    )


def load_state(path: str | Path, whole: bool = False) -> dict[str, Tensor]:
    """Tensors of a checkpoint under clean names.

    Wrapper names are removed at any depth (DDP, torch.compile, FSDP, activation checkpointing), containers such as
    ``{"model": ...}`` are opened, and a prefix that every name has is cut off. Pickles are read with
    ``weights_only=True`` and ``argparse.Namespace`` as the one class allowed.

    Args:
        path: a file or folder, see :func:`find_weights`.
        whole: see :func:`find_weights`.

    Raises:
        InputError: there is no file, it cannot be read safely, it holds no tensors, or empty or NaN ones.
    """
    if name := published(path):
        return dict(fetched(name).state_dict())
    file = find_weights(path, whole)
    content = _read(file)
    opened = content
    while True:
        inner = next((opened[key] for key in CONTAINERS if isinstance(opened.get(key), Mapping)), None)
        if inner is None:
            break
        opened = inner
    state = {str(name): value for name, value in opened.items() if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"{file}: holds no tensors by name; its keys: {', '.join(map(str, list(content)[:8]))}")
    empty, broken = unusable(state)
    if empty:
        raise InputError(
            f"{file}: tensors without elements, as placeholders of sharded weights are: {', '.join(empty[:5])}; "
            "write the whole weights with the tool that made it"
        )
    if broken:
        raise InputError(f"{file}: weights that are not finite: {', '.join(broken[:5])}; use an earlier checkpoint")
    state = {".".join(part for part in name.split(".") if part not in WRAPPERS): state[name] for name in state}
    if is_transformers(state):
        return timm_names(state)
    while prefix := next((p for p in COMMON_PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def unusable(tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names of tensors without elements, as placeholders of sharded weights are, and of those that are not finite."""
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    real = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.is_meta}
    return empty, [name for name, tensor in real.items() if not tensor.isfinite().all()]


def _read(file: Path) -> Mapping[Any, Any]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is not ours may fail in any way
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise InputError(
                f"{file}: refused, it holds more than tensors ({refused[1]}); if you trust its source, open it "
                "where it was made and save its state dict alone"
            ) from None
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(f"{file}: cannot be read as weights: {type(error).__name__}: {reason}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{file}: holds a {type(content).__name__}; allowed: a state dict, or a dict that holds one")
    return content


def encoder_config(path: str | Path) -> dict[str, Any]:
    """Arguments that build the encoder of a run, a checkpoint inside a run, or an export.

    Args:
        path: the folder, a file in it, or a file that says it itself.

    Returns:
        Arguments of :func:`ssl_vit.encoders.base.create_encoder`, and under ``data`` what is stated of ``mean, std,
        crop_pct, interpolation``.

    Raises:
        InputError: nothing there states the architecture, or it cannot be built.
    """
    if name := published(path):
        return published_config(name)
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors" and (stated := _stated_in(path)):
        return _from_timm_config(path, stated)
    for folder in [path if path.is_dir() else path.parent, *run_of_checkpoint(path)]:
        for config in (folder / "config.json", folder / "encoder" / "config.json"):
            if config.is_file():
                return _from_timm_config(config, config.read_text(encoding="utf-8", errors="replace"))
        if (folder / "recipe.yaml").is_file():
            recipe = load_yaml([folder / "recipe.yaml"], [])
            encoder, data = recipe.get("encoder") or {}, recipe.get("data") or {}
            stated = {key: value for key, value in encoder.items() if key != "init"}
            return {**stated, "data": {key: data[key] for key in DATA_KEYS if data.get(key) is not None}}
    raise InputError(f"{path}: does not say which encoder it holds; give it as encoder.name=... (and img_size ...)")


def run_of_checkpoint(path: Path) -> list[Path]:
    """The run that a checkpoint, or a file in one, is of; none for any other path."""
    return [parent.parent for parent in path.absolute().parents[:2] if parent.name == "checkpoints"]


def _stated_in(file: Path) -> str | None:
    """What config.json of a timm folder says, as the metadata of a file hold it."""
    try:
        with safe_open(file, "pt") as content:
            return (content.metadata() or {}).get("config")
    except (SafetensorError, OSError):  # who reads its tensors says what is wrong
        return None


def _from_timm_config(file: Path, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
        if "ssl_vit" in config:
            return {**config["ssl_vit"]["encoder"], "data": config["ssl_vit"]["data"]}
        if "model_type" in config:
            return _from_transformers(file, config)
        name, arguments = config["architecture"], dict(config.get("model_args") or {})
        stated = config.get("pretrained_cfg") or config
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: not the config.json of a timm folder ({type(error).__name__}: {error})") from None
    foreign = sorted(set(arguments) - {*TIMM_ARGUMENTS, *OTHER_TIMM_ARGUMENTS})
    if foreign:
        raise InputError(f"{file}: cannot be built here, model_args has {', '.join(foreign)}")
    try:
        cls = encoder_class_of(name)
        built = timm_facts(name, arguments, stated)
        with torch.device("meta"):
            cls(**built)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{file}: cannot be built here: {error}") from None
    return {**built, "data": {key: stated[key] for key in DATA_KEYS if stated.get(key) is not None}}


def _from_transformers(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    beside = file.with_name("preprocessor_config.json")
    data = stated_pixels(json.loads(beside.read_text(encoding="utf-8"))) if beside.is_file() else {}
    try:
        return {**encoder_arguments(config), "data": data}
    except ValueError as error:
        raise InputError(f"{file}: cannot be built here: {error}") from None
