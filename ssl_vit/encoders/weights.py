"""Weights from files: official MAE files, timm, our own runs and exports; every key is accounted for.

Foreign files are read with ``weights_only=True`` or as safetensors. Nothing is ever loaded in part without a word.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_vit.config import InputError
from ssl_vit.encoders.base import Encoder

CONTAINERS = ("model", "state_dict", "module", "model_state_dict")
WRAPPERS = {"module", "_orig_mod"}
PREFIXES = ("encoder.model.", "", "model.", "encoder.", "backbone.", "vit.")
MARK = "patch_embed.proj.weight"
NOT_ENCODER = ("decoder", "mask_token", "head", "head_dist", "lm_head", "projector", "predictor")
DATA_KEYS = ("mean", "std", "crop_pct", "interpolation")


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a run, checkpoint or export folder, under names without wrapper prefixes.

    Raises:
        InputError: there is no such file, or it holds no plain tensors.
    """
    file = weights_file(Path(path))
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            # the official MAE files hold their command line as a Namespace beside the weights: the one safe global
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{file}: cannot be read as weights (safetensors, or torch.load without code): {reason}"
        ) from None
    for container in CONTAINERS:
        if isinstance(state, dict) and isinstance(state.get(container), dict):
            state = state[container]
            break
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise InputError(f"{file}: holds no named tensors; allowed: a state dict, or one under {', '.join(CONTAINERS)}")
    return {".".join(part for part in name.split(".") if part not in WRAPPERS): t for name, t in tensors.items()}


def weights_file(path: Path) -> Path:
    """The file of weights that a path means: itself, or the one in a run, checkpoint or export folder.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; give a run, a checkpoint, an export or a file of weights")
    newest = sorted(path.glob("checkpoints/step_*/manifest.json"))
    for candidate in (
        path / "encoder" / "model.safetensors",
        path / "model.safetensors",
        path / "objective.safetensors",
        *(file.with_name("objective.safetensors") for file in newest[-1:]),
    ):
        if candidate.is_file():
            return candidate
    raise InputError(f"{path}: holds no weights; give a run, a checkpoint folder, an export or a file of weights")


def encoder_config(path: str | Path) -> dict[str, Any]:
    """What a run, checkpoint or timm folder says of its encoder; empty for a bare file of weights.

    Returns:
        Constructor arguments of the encoder, and under ``data`` its mean, std, crop_pct and interpolation.
    """
    file = weights_file(Path(path))
    if (file.parent / "config.json").is_file():
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        if "ssl_vit" in config:
            return {**config["ssl_vit"]["encoder"], "data": config["ssl_vit"]["data"]}
        return _from_timm(config)
    for folder in file.parents[:4]:
        if (folder / "recipe.yaml").is_file():
            recipe: Any = OmegaConf.to_container(OmegaConf.load(folder / "recipe.yaml"))
            encoder = {key: value for key, value in recipe["encoder"].items() if key != "init"}
            return {**encoder, "data": {key: recipe["data"][key] for key in DATA_KEYS}}
    return {}


def _from_timm(config: dict[str, Any]) -> dict[str, Any]:
    """A timm folder that others wrote: architecture, arguments and preprocessing."""
    arguments, stated = config.get("model_args", {}), config.get("pretrained_cfg", {})
    known = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token", "global_pool")
    encoder = {key: arguments[key] for key in known if key in arguments}
    size = arguments.get("img_size") or stated.get("input_size", (3, 224, 224))[1:]
    encoder |= {"name": config["architecture"], "img_size": size, "pos_embed": "learned"}
    return {**encoder, "data": {key: stated[key] for key in DATA_KEYS if key in stated}}


def fill_encoder(encoder: Encoder, path: str | Path) -> str:
    """``encoder.init=``: fill an encoder from any layout that holds a ViT.

    A position table of another grid is resized (a fixed one is computed anew).

    Returns:
        What was loaded, resized and ignored, in words.

    Raises:
        InputError: keys are missing, unexpected or of another shape; the message names them.
    """
    state = load_state(path)
    prefix = next((p for p in PREFIXES if p + MARK in state), None)
    if prefix is None:
        groups = ", ".join(sorted({name.split(".")[0] for name in state})[:8])
        raise InputError(f"{path}: holds no ViT encoder (no key ends in {MARK}); it has {groups}")
    found = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    ignored = Counter(name.split(".")[0] for name in state if not name.startswith(prefix))
    for name in [name for name in found if name.split(".")[0].startswith(NOT_ENCODER)]:
        ignored[name.split(".")[0]] += 1
        del found[name]
    if "fc_norm.weight" in found:
        raise InputError(f"{path}: was fine-tuned with the norm behind the pooling (fc_norm); this encoder norms first")
    notes = _fit_positions(encoder, found, Path(path))
    _load(encoder.model, found, path, "encoder")
    words = [f"{len(found)}/{len(encoder.model.state_dict())} tensors from {path}", *notes]
    if ignored:
        words.append("ignored: " + ", ".join(f"{name} ({count})" for name, count in sorted(ignored.items())))
    return "; ".join(words)


def _fit_positions(encoder: Encoder, found: dict[str, Tensor], path: Path) -> list[str]:
    """Bring the position table to the encoder's grid; returns a note if something was done."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    own: Tensor = encoder.model.pos_embed
    table = found.get("pos_embed")
    if table is None or table.shape[-1] != own.shape[-1]:
        return []
    prefix = 0 if encoder.model.no_embed_class else encoder.num_prefix_tokens
    count = table.shape[1] - prefix
    config = encoder_config(path)
    size, patch = config.get("img_size"), config.get("patch_size")
    if size and patch:
        height, width = (size, size) if isinstance(size, int) else size
        grid = (height // patch, width // patch)
    elif table.shape == own.shape:
        grid = encoder.grid_size
    else:
        grid = (round(count**0.5), round(count**0.5))
    if grid == encoder.grid_size:
        return []
    if grid[0] * grid[1] != count:
        raise InputError(
            f"{path}: pos_embed has {count} patch positions, which is no grid that the file states or a square"
        )
    if not own.requires_grad:
        found["pos_embed"] = own.detach().clone()
        return [f"fixed position table computed for {encoder.grid_size} (file: {grid})"]
    found["pos_embed"] = resample_abs_pos_embed(table, list(encoder.grid_size), list(grid), prefix)
    return [f"position table resized from {grid} to {encoder.grid_size}"]


def fill_objective(objective: nn.Module, path: str | Path) -> str:
    """``objective.init=``: fill a whole objective, decoder and heads included.

    Returns:
        What was loaded, in words.

    Raises:
        InputError: the file holds an encoder only, or its keys or shapes differ; the message names them.
    """
    state = load_state(path)
    own = objective.state_dict()
    if MARK in state:  # the official layout: encoder and decoder side by side
        inner = {name.removeprefix("encoder.model.") for name in own if name.startswith("encoder.model.")}
        state = {f"encoder.model.{name}" if name in inner else name: t for name, t in state.items()}
    parts = {name.split(".")[0] for name in own} - {"encoder"}
    if parts and not parts & {name.split(".")[0] for name in state}:
        raise InputError(
            f"{path}: is an encoder-only file (no {', '.join(sorted(parts)[:3])}); use encoder.init= for it"
        )
    _load(objective, state, path, "objective")
    return f"{len(state)}/{len(own)} tensors from {path}"


def _load(module: nn.Module, found: dict[str, Tensor], path: str | Path, what: str) -> None:
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    shapes = [
        f"{name} {tuple(found[name].shape)}, here {tuple(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    problems = [
        f"{word}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for word, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        cure = (
            f"give the {what} the sizes of the file (name, patch_size, in_chans, embed_dim, depth ...), or another file"
        )
        raise InputError(f"{path}: does not fit this {what}; {'; '.join(problems)}; {cure}")
    module.load_state_dict(found)
