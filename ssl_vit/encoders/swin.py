"""Swin Transformers of timm: windows, four stages or fewer, a mask at the resolution of the first patches."""

from __future__ import annotations

import copy
import math
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit.config import nearest
from ssl_vit.encoders.architectures import check_drop_path, check_img_size, check_sizes, height_width
from ssl_vit.encoders.base import Encoder, Tokens
from ssl_vit.encoders.vit import run_blocks

BUFFERS = ("relative_position_index", "attn_mask")
"""What files of older versions hold and the sizes decide."""


class Swin(Encoder):
    """Swin Transformer (arXiv 2103.14030) as timm builds it.

    A token of the output stands for ``patch_size`` pixels, the stride of the last stage; a mask acts on the first
    patches, ``mask_stride`` pixels wide.

    Args:
        name: timm architecture, e.g. swin_base_patch4_window7_224
        img_size: height and width in pixels, or one number for both
        first_patch_size: side of the first patches in pixels; default: the architecture's
        window_size: side of the attention windows in tokens; default: the architecture's
        in_chans: channels of the image
        embed_dim: width of the first stage; default: the architecture's
        depths: blocks of each stage; default: the architecture's
        num_heads: attention heads of each stage; default: the architecture's
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block
        grad_checkpointing: compute activations again in the backward pass; slower, much less memory

    Raises:
        ValueError: an unknown name or an impossible value.
    """

    def __init__(
        self,
        name: str,
        img_size: int | tuple[int, int] = 224,
        first_patch_size: int | None = None,
        window_size: int | None = None,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depths: list[int] | None = None,
        num_heads: list[int] | None = None,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        import timm

        self.name = _swin_name(name)
        given = {"first_patch_size": first_patch_size, "window_size": window_size, "embed_dim": embed_dim}
        check_sizes(in_chans=in_chans, first_patch_size=first_patch_size, window_size=window_size, embed_dim=embed_dim)
        check_drop_path(drop_path_rate)
        sizes = {
            **copy.deepcopy(_swin_sizes(self.name)),
            **{key: value for key, value in given.items() if value is not None},
        }
        sizes |= {"depths": list(depths)} if depths else {}
        sizes |= {"num_heads": list(num_heads)} if num_heads else {}
        if len(sizes["depths"]) != len(sizes["num_heads"]):
            raise ValueError(f"num_heads={sizes['num_heads']}: should have a number for each of depths")
        for stage, heads in enumerate(sizes["num_heads"]):
            check_sizes(f"stage {stage} ", embed_dim=sizes["embed_dim"] * 2**stage, num_heads=heads)
        self.img_size = height_width(img_size)
        self.mask_stride = sizes["first_patch_size"]
        self.patch_size = self.mask_stride * 2 ** (len(sizes["depths"]) - 1)
        check_img_size(self.img_size, self.patch_size, f"{self.patch_size}, the stride of the last stage")
        self.grid_size = (self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size)
        self._arguments, self.in_chans = {**sizes, "in_chans": in_chans}, in_chans
        self.drop_path_rate, self.grad_checkpointing, self.num_prefix_tokens = drop_path_rate, grad_checkpointing, 0
        architecture, arguments = self.timm_config()
        self.model = timm.create_model(architecture, drop_path_rate=drop_path_rate, **arguments)
        self.embed_dim = self.token_dim = int(self.model.num_features)

    def timm_config(self) -> tuple[str, dict[str, Any]]:
        """Architecture and arguments with which ``timm.create_model`` alone builds ``self.model``."""
        sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in self._arguments.items()}
        sizes["patch_size"] = sizes.pop("first_patch_size")
        return self.name, {**sizes, "img_size": self.img_size, "num_classes": 0}

    @property
    def num_layers(self) -> int:
        """The number of the last layer: the final norm, and a classifier."""
        return sum(self._arguments["depths"]) + 1

    def layer_of(self, name: str) -> int:
        """The layer of a parameter: blocks counted over all stages, a merging of patches with the block before it."""
        part = name.removeprefix("model.").split(".")
        if part[0] != "layers":
            return 0 if part[0] == "patch_embed" else self.num_layers
        before = sum(self._arguments["depths"][: int(part[1])])
        return before + int(part[3]) + 1 if part[2] == "blocks" else before

    @property
    def stages(self) -> list[nn.Module]:
        """The stages; all but the last are wider grids of narrower tokens."""
        return list(self.model.layers)

    def tokens_of(self, output: Tensor, norm: bool = True) -> Tokens:
        """The output (B, h, w, D) of a stage but the last, without norm."""
        patches = output.flatten(1, 2)
        return Tokens(patches[:, :0], patches)

    def fitted(
        self, state: dict[str, Tensor], grid: tuple[int, int] | None, where: str
    ) -> tuple[dict[str, Tensor], list[str]]:
        """A file's tensors as timm has them now, relative positions resized (bicubic) to windows of another size."""
        from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

        state = {name: t for name, t in state.items() if name.rpartition(".")[2] not in BUFFERS}
        notes: list[str] = []
        if (
            "layers.0.downsample.reduction.weight" in state
        ):  # as released: a merging ends a stage, in timm it begins one
            state = {
                re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name): tensor
                for name, tensor in state.items()
            }
            notes.append("merging of patches renamed from the release's layout")
        resized, change = 0, ""
        for name, module in self.model.named_modules():
            table = state.get(f"{name}.relative_position_bias_table")
            own = getattr(module, "relative_position_bias_table", None)
            if table is None or own is None or table.shape == own.shape or table.shape[1:] != own.shape[1:]:
                continue  # another number of heads is named by the comparison of shapes
            state[f"{name}.relative_position_bias_table"] = resize_rel_pos_bias_table(
                table, module.window_size, own.shape
            )
            side = (math.isqrt(len(table)) + 1) // 2
            resized, change = resized + 1, f"windows of {side} to {module.window_size[0]} tokens"
        return state, [*notes, f"relative positions: {resized} tables resized, {change}"] if resized else notes

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tokens:
        """Encode an image; masked first patches are replaced by the mask token.

        Args:
            image: (B, C, H, W), normalised.
            mask: bool (B, M), True = masked, over the first patches.
            mask_token: (1, 1, D), as wide as the first stage, needed with ``mask``.
        """
        self.check_image(image)
        tokens = self.model.patch_embed(image)  # (B, h, w, D)
        if mask is not None:
            assert mask_token is not None, "a mask needs a mask token"
            place = mask.view(*tokens.shape[:3], 1)
            tokens = torch.where(place, mask_token.to(tokens.dtype)[:, :, None], tokens)
        tokens = run_blocks(self.model.layers, tokens, self.grad_checkpointing)
        patches = self.model.norm(tokens).flatten(1, 2)  # (B, N, D)
        return Tokens(patches[:, :0], patches)


def _swin_name(name: str) -> str:
    import timm

    names = [known for known in timm.list_models("swin_*") if not known.startswith(("swin_s3", "swinv2"))]
    if name not in names:
        raise ValueError(f"name={name!r}: timm has no such Swin{nearest(name, names)}; allowed: {', '.join(names)}")
    return name


@cache
def _swin_sizes(name: str) -> dict[str, Any]:
    """Constructor arguments that timm gives an architecture."""
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    return {
        "first_patch_size": model.patch_embed.patch_size[0],
        "window_size": model._ref_window_sizes[0][0],
        "embed_dim": model.embed_dim,
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in model.layers],
    }
