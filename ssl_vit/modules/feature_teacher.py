"""A trained network whose features of patches are regressed: frozen, with its own normalisation and picture size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.config import InputError, Section, nearest
from ssl_vit.data.channels import normalised
from ssl_vit.encoders.architectures import height_width
from ssl_vit.encoders.base import Encoder, create_encoder
from ssl_vit.encoders.classifiers import take_size
from ssl_vit.encoders.weights import encoder_config, fill_encoder, load_state

FALLBACK = (0.5, 0.5, 0.5)


class FeatureTeacherSection(Section):
    """The teacher of VQ-KD: one of our encoders, or any timm model.

    Args:
        weights: local file or folder: a run or export of ours, or with name a state dict of the timm model
        name: timm architecture, e.g. vit_base_patch16_clip_224; default: what the run or export says
        img_size: pictures are resized to it; default: what gives the teacher one patch a code
        mean: per channel, of pixels in [0, 1]; default: as the teacher was trained
        std: per channel; default: as the teacher was trained
        project: apply the last layer to each patch, as the published CLIP teacher does; needs name
    """

    weights: str | None = None
    name: str | None = None
    img_size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    project: bool = False


class FeatureTeacher(nn.Module):
    """Features of patches on a stated grid, of pictures with pixels in [0, 1].

    Args:
        section: which network.
        grid_size: (h, w) of the features that are wanted.
        in_chans: channels of the pictures.

    Raises:
        ValueError: no weights are given, they do not fit, or the network has no patches.
    """

    def __init__(self, section: FeatureTeacherSection, grid_size: tuple[int, int], in_chans: int) -> None:
        super().__init__()
        if section.weights is None:
            raise ValueError(
                "teacher.weights=None: VQ-KD needs a trained teacher: a run or export of ours, or teacher.name and a "
                "local file of its weights (nothing is downloaded); without a teacher: objective.kind=dvae"
            )
        self.grid_size = grid_size
        build = self._ours if section.name is None else self._timm
        with torch.device("cpu"):
            self.model, stated = build(section, in_chans)
        model: Any = self.model.eval()  # batch norms must not learn from the call below
        self.last: Any = model.get_classifier() if section.project else None
        self.mean, self.std = section.mean or stated["mean"], section.std or stated["std"]
        if not len(self.mean) == len(self.std) == in_chans:
            raise ValueError(
                f"teacher.mean={list(self.mean)}, teacher.std={list(self.std)}: allowed: one number for each of "
                f"{in_chans} channels"
            )
        size = stated["img_size"]
        self.img_size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        with torch.no_grad(), torch.device("cpu"):
            self.dim: int = self(torch.zeros(1, in_chans, *self.img_size)).shape[-1]

    def _ours(self, section: FeatureTeacherSection, in_chans: int) -> tuple[Any, dict[str, Any]]:
        if section.project:
            raise ValueError("teacher.project=True: only for timm models given as teacher.name; an encoder has no head")
        try:
            stated = encoder_config(str(section.weights))
            data = stated.pop("data", {})
            patch = stated.get("patch_size") or create_encoder(**stated).patch_size
            size = section.img_size or [side * patch for side in self.grid_size]
            encoder = create_encoder(**{**stated, "img_size": size, "in_chans": in_chans})
            fill_encoder(encoder, str(section.weights))
        except InputError as error:
            raise ValueError(f"teacher.weights={section.weights}: {error}") from None
        data = {"mean": FALLBACK, "std": FALLBACK} | {key: tuple(data[key]) for key in ("mean", "std") if key in data}
        return encoder, {**data, "img_size": size}

    def _timm(self, section: FeatureTeacherSection, in_chans: int) -> tuple[Any, dict[str, Any]]:
        import timm

        assert section.name is not None
        if not timm.is_model(section.name):
            names = timm.list_models()
            raise ValueError(f"teacher.name={section.name!r}: timm has no such model{nearest(section.name, names)}")
        with torch.device("meta"):
            plain: Any = timm.create_model(section.name)
        config, embed = plain.pretrained_cfg, getattr(plain, "patch_embed", None)
        arguments: dict[str, Any] = {"in_chans": in_chans}
        size = section.img_size or config["input_size"][-2:]
        if embed is not None and hasattr(embed, "patch_size"):
            size = section.img_size or tuple(s * p for s, p in zip(self.grid_size, embed.patch_size, strict=True))
        state = load_state(str(section.weights))
        head = config["classifier"] if section.project else None
        arguments["num_classes"] = state[f"{head}.weight"].shape[0] if f"{head}.weight" in state else 0
        model = timm.create_model(section.name, **arguments)
        own = model.state_dict()
        # a file may hold a last layer that is not wanted
        last = [config["classifier"]] if isinstance(config["classifier"], str) else list(config["classifier"] or [])
        state = {n: t for n, t in state.items() if n in own or not n.startswith(tuple(f"{part}." for part in last))}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"teacher.weights={section.weights}: does not fit {section.name}: {' '.join(str(error).split())[:400]}"
            ) from None
        take_size(model, height_width(size), in_chans)
        return model, {"mean": config["mean"], "std": config["std"], "img_size": size}

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(B, N, dim), patches row by row, of (B, C, H, W) in [0, 1]."""
        if tuple(pixels.shape[-2:]) != self.img_size:
            pixels = F.interpolate(pixels, self.img_size, mode="bicubic", antialias=True, align_corners=False)
            pixels = pixels.clamp(0, 1)
        image = normalised(pixels, self.mean, self.std)
        if isinstance(self.model, Encoder):
            features, grid = self.model(image).patches, self.model.grid_size
        else:
            features, grid = self._timm_features(image)
        if grid != self.grid_size:
            features = features.transpose(1, 2).unflatten(2, grid)
            features = F.interpolate(features, self.grid_size, mode="bilinear", align_corners=False)
            features = features.flatten(2).transpose(1, 2)
        return features if self.last is None else self.last(features)

    def _timm_features(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        model: Any = self.model
        features = model.forward_features(image)
        if features.ndim == 4:  # convolutions: channels first; Swin: channels last
            if features.shape[1] != model.num_features:
                features = features.permute(0, 3, 1, 2)
            return features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3])
        if not hasattr(model, "patch_embed"):
            raise ValueError(f"teacher.name: {type(model).__name__} has no features of patches")
        return features[:, model.num_prefix_tokens :], tuple(model.patch_embed.grid_size)
