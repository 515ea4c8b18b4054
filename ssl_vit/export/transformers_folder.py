"""The encoder, or a whole MAE, as a folder of transformers' own classes: ViTModel, DeiTModel, BeitModel, SwinModel."""

from __future__ import annotations

import copy
import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_vit.config import InputError
from ssl_vit.encoders.base import Encoder
from ssl_vit.encoders.vit import ViT
from ssl_vit.export.reading import Reading, encoder_cases, reading
from ssl_vit.export.timm_folder import whole_folder, whole_state
from ssl_vit.export.transformers_names import BUFFERS, transformers_names
from ssl_vit.objectives.mae import MAE


def export_transformers(
    encoder: Encoder, folder: Path, data: dict[str, Any], facts: Mapping[str, Any] | None = None, fresh: bool = False
) -> Reading:
    """Write a folder from which ``AutoModel.from_pretrained(FOLDER)`` gives the class of the architecture.

    Args:
        encoder: whole, any device and precision; written in float32.
        folder: the folder to write; replaced in one rename, after the check.
        data: ``mean, std, crop_pct, interpolation`` of the images.
        facts: kept in config.json, such as ``license``.
        fresh: check it in a process of its own.

    Raises:
        ValueError: transformers has no class for this encoder, or its weights are not whole.
        RuntimeError: what transformers loads differs, the tokens by more than 1e-5.
    """
    if getattr(encoder.model, "fc_norm", None) is not None and encoder.config().get("fc_norm"):
        raise ValueError("fc_norm=true: transformers has no norm behind the pooling; allowed: format=timm, state_dict")
    family = encoder.name.partition("_")[0]
    makers = {"vit": _vit, "deit": _vit, "beit": _beit, "beitv2": _beit, "swin": _swin}
    if family not in makers:
        raise ValueError(
            f"encoder.name={encoder.name!r}: transformers has no class for it; allowed: vit_*, deit_*, beit*, swin_*"
        )
    cls, config, arguments = makers[family](encoder)
    state = whole_state(encoder.model)
    if isinstance(encoder, ViT):  # as they are added: rows and columns joined, prefix tokens with a position
        table: Tensor = encoder.positions().detach().cpu().float()
        missing = encoder.num_prefix_tokens + math.prod(encoder.grid_size) - table.shape[1]
        state["pos_embed"] = torch.nn.functional.pad(table, (0, 0, missing, 0))
    model = _filled(cls, config, arguments | dict(facts or {}), transformers_names(state), encoder)
    with whole_folder(folder) as temporary:
        _write(model, temporary, encoder, data)
        return reading("transformers", temporary, encoder_cases(encoder), data, fresh=fresh)


def export_mae(
    mae: MAE, folder: Path, data: dict[str, Any], facts: Mapping[str, Any] | None = None, fresh: bool = False
) -> Reading:
    """Write a whole MAE, decoder included, as ``ViTMAEForPreTraining``; for its arguments see the other export.

    What it predicts of every patch of three images under the same masks is compared.
    """
    encoder = mae.encoder
    arguments = _vit(encoder)[2]
    blocks: Any = mae.decoder_blocks
    arguments |= {
        "decoder_hidden_size": mae.decoder_embed.out_features,
        "decoder_num_hidden_layers": len(blocks),
        "decoder_num_attention_heads": blocks[0].attn.num_heads,
        "decoder_intermediate_size": blocks[0].mlp.fc1.out_features,
        "mask_ratio": mae.mask_ratio,
        "norm_pix_loss": mae.norm_pix_loss,
    }
    state = whole_state(mae)
    state = {name.removeprefix("encoder.model."): tensor for name, tensor in state.items()}
    arguments |= dict(facts or {})
    model = _filled("ViTMAEForPreTraining", "ViTMAEConfig", arguments, transformers_names(state, "vit."), encoder)
    with whole_folder(folder) as temporary:
        _write(model, temporary, encoder, data)
        return reading("vit_mae", temporary, _mae_cases(mae), data, fresh=fresh)


def _mae_cases(mae: MAE) -> dict[str, Tensor]:
    own, image = copy.deepcopy(mae).cpu().float().eval(), encoder_cases(mae.encoder)["image"]
    noise = torch.rand(len(image), math.prod(own.encoder.grid_size), generator=torch.Generator().manual_seed(1))
    mask = noise.argsort(dim=1).argsort(dim=1) >= own.num_visible
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return {"image": image, "noise": noise, "predicted patches": own.predict({"image": image, "mask": mask})}


def _no_pooler(cls: str) -> dict[str, bool]:
    """Bare models get a pooler of random weights unless told not to."""
    return {} if cls == "ViTMAEForPreTraining" else {"add_pooling_layer": False}


def _vit(encoder: Encoder) -> tuple[str, str, dict[str, Any]]:
    model = encoder.model
    if getattr(model, "cls_token", None) is None:
        raise ValueError("class_token=false: transformers' ViT has a class token; allowed: format=timm, state_dict")
    if hasattr(model.patch_embed, "backbone"):
        raise ValueError(f"encoder.name={encoder.name!r}: a hybrid; transformers has none; allowed: format=timm")
    distilled = getattr(model, "dist_token", None) is not None
    block = model.blocks[0]
    arguments = {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": block.norm1.eps,
        "patch_size": encoder.patch_size,
    }
    return ("DeiTModel", "DeiTConfig", arguments) if distilled else ("ViTModel", "ViTConfig", arguments)


def _beit(encoder: Encoder) -> tuple[str, str, dict[str, Any]]:
    arguments = _vit(encoder)[2]
    config, block = encoder.config(), encoder.model.blocks[0]
    return "BeitModel", "BeitConfig", {
        **arguments,
        "use_mean_pooling": False,  # of the pooler alone, and it would take the final norm away
        "use_absolute_position_embeddings": config["abs_pos"],
        "use_relative_position_bias": config["rel_pos"] == "layer",
        "use_shared_relative_position_bias": config["rel_pos"] == "shared",
        "layer_scale_init_value": 0.1 if block.gamma_1 is not None else 0.0,
    }  # fmt: skip


def _swin(encoder: Encoder) -> tuple[str, str, dict[str, Any]]:
    sizes, block = encoder.config(), encoder.model.layers[0].blocks[0]
    return "SwinModel", "SwinConfig", {
        "embed_dim": sizes["embed_dim"],
        "depths": sizes["depths"],
        "num_heads": sizes["num_heads"],
        "window_size": sizes["window_size"],
        "patch_size": sizes["first_patch_size"],
        "mlp_ratio": block.mlp.fc1.out_features / sizes["embed_dim"],
        "layer_norm_eps": block.norm1.eps,
    }  # fmt: skip


def _filled(cls: str, config: str, arguments: dict[str, Any], state: dict[str, Tensor], encoder: Encoder) -> Any:
    """The model of transformers with our weights; every tensor of both has its place."""
    transformers = _library()
    height, width = encoder.img_size
    image = {"image_size": height if height == width else [height, width], "num_channels": encoder.in_chans}
    pool = {key: value for key, value in encoder.config().items() if key == "global_pool"}  # kept for encoder.init
    built = getattr(transformers, config)(**arguments, **image, **pool)
    model = getattr(transformers, cls)(built, **_no_pooler(cls)).eval()
    own = {name: value for name, value in model.state_dict().items() if not name.endswith(BUFFERS)}
    unknown = [name for name in state if name not in own]
    missing = [name for name in own if name not in state]
    if unknown or missing:
        raise ValueError(
            f"encoder.name={encoder.name!r}: is not what transformers' {cls} computes: without place there: "
            f"{', '.join(unknown[:4]) or 'nothing'}; without value here: {', '.join(missing[:4]) or 'nothing'}; "
            "allowed: format=timm, state_dict"
        )
    model.load_state_dict(state, strict=False)
    return model


def _write(model: Any, folder: Path, encoder: Encoder, data: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    text = json.dumps(_preprocessor(encoder, data), indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def _preprocessor(encoder: Encoder, data: dict[str, Any]) -> dict[str, Any]:
    """The evaluation's resize, centre crop and normalisation in the words of transformers' image processors."""
    height, width = encoder.img_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(min(height, width) / data["crop_pct"])},
        "resample": {"bilinear": 2, "bicubic": 3}[data["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "crop_pct": data["crop_pct"],  # of which "size" is the rounded outcome
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
        "do_convert_rgb": encoder.in_chans == 3,
    }


def _library() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise InputError("format=transformers: needs the library: pip install 'transformers>=5.0'") from None
