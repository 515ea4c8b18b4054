"""timm's models as encoders: published ones by their name, and what a model says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_vit.config import InputError, nearest
from ssl_vit.encoders.base import encoder_class_of

DATA_KEYS = ("mean", "std", "crop_pct", "interpolation")
TIMM_ARGUMENTS = (
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token",
    "channels", "layers",
)  # fmt: skip
PUBLISHED = "timm:"
"""What begins the name of a model whose published weights timm fetches, or has in its cache."""


def published(path: str | Path) -> str | None:
    """The name of a published timm model, None for a file or folder."""
    return str(path).removeprefix(PUBLISHED) if str(path).startswith(PUBLISHED) else None


def fetched(name: str) -> Any:
    """A timm model with its published weights.

    Raises:
        InputError: timm does not know it, or its weights cannot be had.
    """
    import timm

    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # an unknown name, no weights, no network: many kinds
        reason = next(iter(str(error).splitlines()), "")
        near = nearest(name, timm.list_pretrained())
        raise InputError(
            f"{PUBLISHED}{name}: no weights of timm ({type(error).__name__}: {reason}){near}; needs the network once, "
            "or a file given in its place"
        ) from None


def published_config(name: str) -> dict[str, Any]:
    """Arguments that build our encoder of a published model, and its preprocessing under ``data``.

    Raises:
        InputError: none of our encoders is built from it.
    """
    import timm

    architecture = name.partition(".")[0]
    try:
        encoder_class_of(architecture)
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        stated = model.pretrained_cfg
        facts = timm_facts(architecture, {}, stated)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{PUBLISHED}{name}: {error}") from None
    return {**facts, "data": {key: stated[key] for key in DATA_KEYS if stated.get(key) is not None}}


def usual_pixels(name: str | None, in_chans: int) -> dict[str, Any]:
    """Preprocessing where nothing states it: mean and standard deviation of ImageNet, or of an architecture's weights.

    timm's figures of plain ViTs are AugReg's; files of that layout come from MAE, DINO and iBOT, which take ImageNet's.

    Args:
        name: of the architecture whose published weights are meant; None: of no weights.
        in_chans: channels of the image.
    """
    import timm
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if in_chans != 3:
        mean = std = (0.5,) * in_chans
    elif name and not name.startswith("vit_"):
        weights: Any = timm.get_pretrained_cfg(name if timm.is_model(name) else f"{name}_224")
        mean, std = weights.mean, weights.std
    return {"mean": mean, "std": std, "crop_pct": 0.875, "interpolation": "bicubic"}


def timm_facts(name: str, arguments: dict[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments for a timm folder that was not written here; pooling and class token as timm would have them."""
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, **{**arguments, "num_classes": 0})
    size = arguments.get("img_size") or stated.get("input_size", (3, 224, 224))[-2:]
    facts = {
        "name": name,
        **{key: value for key, value in arguments.items() if key in TIMM_ARGUMENTS},
        "img_size": size if isinstance(size, int) else list(size),
    }
    if not hasattr(model, "patch_embed"):
        return facts
    if hasattr(model, "layers"):  # Swin: windows and stages are the architecture's
        return facts
    behind_mean = bool(list(getattr(model, "fc_norm", nn.Identity()).parameters()))
    if hasattr(model, "rel_pos_bias"):  # BEiT
        own = model.blocks[0].attn.relative_position_bias_table is not None
        return {
            **facts,
            "patch_size": model.patch_embed.patch_size[0],
            "global_pool": model.global_pool,
            "fc_norm": behind_mean,
            "rel_pos": "shared" if model.rel_pos_bias is not None else "layer" if own else "none",
            "abs_pos": model.pos_embed is not None,
        }
    return {
        **facts,
        "patch_size": model.patch_embed.patch_size[0],
        "class_token": model.has_class_token,
        "global_pool": model.global_pool,
        "fc_norm": behind_mean,
        "pos_embed": "learned",
    }
