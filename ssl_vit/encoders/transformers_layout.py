"""Files and folders of transformers' ViTs, MAEs, DeiTs, BEiTs and Swins, read as timm has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

ANCHOR = "embeddings.patch_embeddings.projection.weight"
RULES = (
    (r"^(vit|deit|beit|swin)\.", ""),
    (r"^decoder\.decoder_(encoder\.layer|layers)\.", "decoder_blocks."),
    (r"^decoder\.(decoder_|mask_token)", r"\1"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^layernorm\.", "norm."),
    (r"^(encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"^encoder\.layers\.(\d+\.(blocks|downsample))", r"layers.\1"),
    (r"^(encoder\.layer|layers)\.(\d+)\.(?!blocks|downsample)", r"blocks.\2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_", ".gamma_"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.(attention\.|attention\.attention\.|attention\.self\.)?(relative_position_bias\.)?relative_position_bias_table$",
     ".attn.relative_position_bias_table"),
    (r"\.attention\.(attention\.|self\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
)  # fmt: skip
"""Names of transformers 4 and 5, and timm's."""


def is_transformers(names: Iterable[str]) -> bool:
    """Whether tensors have transformers' names."""
    return any(name.endswith(ANCHOR) for name in names)


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under timm's names; q, k and v are one there, and BEiT's k has no bias."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for theirs, ours in RULES:
            name = re.sub(theirs, ours, name)
        if name.startswith("rel_pos_bias."):
            name = "rel_pos_bias.relative_position_bias_table"
        if found := re.match(
            r"layers\.(\d+)\.downsample\.(.*)", name
        ):  # there a stage's end, in timm the next one's beginning
            name = f"layers.{int(found[1]) + 1}.downsample.{found[2]}"
        renamed[name] = tensor
    joined: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        found = re.match(r"(.*\.attn)\.([qkv])\.(weight|bias)$", name)
        if not found:
            joined[name] = tensor
            continue
        where, letter, kind = found.groups()
        parts = [renamed.get(f"{where}.{other}.{kind}") for other in "qkv"]
        if all(part is not None for part in parts):
            joined[f"{where}.qkv.{kind}"] = torch.cat([part for part in parts if part is not None])
        else:
            joined[f"{where}.{letter}_{kind}"] = tensor
    return joined


def encoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of our encoder for the config.json of a transformers folder.

    Raises:
        ValueError: none of our encoders is of that kind.
    """
    kind = config["model_type"]
    if kind == "swin":
        return {
            "name": "swin_tiny_patch4_window7_224", "img_size": config["image_size"],
            "in_chans": config["num_channels"], "first_patch_size": config["patch_size"],
            "window_size": config["window_size"], "embed_dim": config["embed_dim"], "depths": config["depths"],
            "num_heads": config["num_heads"],
        }  # fmt: skip
    names = {"vit": "vit_base_patch16_224", "vit_mae": "vit_base_patch16_224",
             "deit": "deit_base_distilled_patch16_224", "beit": "beit_base_patch16_224"}  # fmt: skip
    if kind not in names:
        raise ValueError(f"model_type={kind!r}: allowed: {', '.join([*names, 'swin'])}")
    arguments = {
        "name": names[kind], "img_size": config["image_size"], "patch_size": config["patch_size"],
        "in_chans": config["num_channels"], "embed_dim": config["hidden_size"], "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"], "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
    }  # fmt: skip
    pool = {"global_pool": config["global_pool"]} if "global_pool" in config else {}  # our exports state it
    if kind != "beit":
        return arguments | {"pos_embed": "sincos2d" if kind == "vit_mae" else "learned"} | pool
    shared, own = config["use_shared_relative_position_bias"], config["use_relative_position_bias"]
    masked = any("MaskedImageModeling" in name for name in config.get("architectures") or ())
    mean = bool(config.get("use_mean_pooling")) and not masked
    return (
        arguments
        | {
            "rel_pos": "shared" if shared else "layer" if own else "none",
            "abs_pos": config["use_absolute_position_embeddings"],
            "layer_scale": config["layer_scale_init_value"] or 0.0,
            "fc_norm": mean,
            "global_pool": "avg" if mean or masked else "token",
        }
        | pool
    )


def stated_pixels(config: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing that a preprocessor_config.json states, under our names."""
    filters = {2: "bilinear", 3: "bicubic"}
    found = {
        "mean": config.get("image_mean"),
        "std": config.get("image_std"),
        "crop_pct": _crop_pct(config),
        "interpolation": filters.get(config.get("resample") or 0),
    }
    return {key: value for key, value in found.items() if value is not None}


def _crop_pct(config: Mapping[str, Any]) -> float:
    """Share of the resized shorter side that the centre crop keeps; all of it where there is none."""
    crop, size = config.get("crop_size"), config.get("size")
    if not config.get("do_center_crop") or not crop or not size:
        return 1.0
    kept, side = (each if isinstance(each, int) else min(each.values()) for each in (crop, size))
    stated = config.get("crop_pct")
    return stated if stated and round(kept / stated) == side else min(kept / side, 1.0)
