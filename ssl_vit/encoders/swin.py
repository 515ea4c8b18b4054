"""Swin Transformers of timm: windows, four stages or fewer, a mask at the resolution of the first patches."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssl_vit.config import nearest
from ssl_vit.encoders.architectures import check_sizes
from ssl_vit.encoders.base import Encoder, Tokens


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
        given = {"patch_size": first_patch_size, "window_size": window_size, "embed_dim": embed_dim}
        check_sizes(in_chans=in_chans, first_patch_size=first_patch_size, window_size=window_size, embed_dim=embed_dim)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate}: allowed: 0 to below 1; nearest: 0.0")
        sizes = {**_swin_sizes(self.name), **{key: value for key, value in given.items() if value is not None}}
        sizes |= {"depths": tuple(depths)} if depths else {}
        sizes |= {"num_heads": tuple(num_heads)} if num_heads else {}
        if len(sizes["depths"]) != len(sizes["num_heads"]):
            raise ValueError(f"num_heads={list(sizes['num_heads'])}: should have a number for each of depths")
        for stage, heads in enumerate(sizes["num_heads"]):
            check_sizes(f"stage {stage} ", embed_dim=sizes["embed_dim"] * 2**stage, num_heads=heads)
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
        self.mask_stride = sizes["patch_size"]
        self.patch_size = self.mask_stride * 2 ** (len(sizes["depths"]) - 1)
        for pixels in self.img_size:
            if pixels < self.patch_size or pixels % self.patch_size:
                near = max(round(pixels / self.patch_size), 1) * self.patch_size
                raise ValueError(
                    f"img_size={pixels}: should be a multiple of {self.patch_size}, the stride of the last stage; "
                    f"nearest: {near}"
                )
        self.grid_size = (self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size)
        self._sizes, self.in_chans = {**sizes, "in_chans": in_chans}, in_chans
        self.drop_path_rate, self.grad_checkpointing, self.num_prefix_tokens = drop_path_rate, grad_checkpointing, 0
        architecture, arguments = self.timm_config()
        self.model = timm.create_model(architecture, drop_path_rate=drop_path_rate, **arguments)
        self.embed_dim = self.token_dim = int(self.model.num_features)

    def config(self) -> dict[str, Any]:
        """Constructor arguments that build this encoder again; plain types."""
        sizes = {key: list(value) if isinstance(value, tuple) else value for key, value in self._sizes.items()}
        sizes["first_patch_size"] = sizes.pop("patch_size")
        return {
            "name": self.name,
            "img_size": list(self.img_size),
            **sizes,
            "drop_path_rate": self.drop_path_rate,
            "grad_checkpointing": self.grad_checkpointing,
        }

    def timm_config(self) -> tuple[str, dict[str, Any]]:
        """Architecture and arguments with which ``timm.create_model`` alone builds ``self.model``."""
        return self.name, {**self._sizes, "img_size": self.img_size, "num_classes": 0}

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tokens:
        """Encode an image; masked first patches are replaced by the mask token.

        Args:
            image: (B, C, H, W), normalised.
            mask: bool (B, M), True = masked, over the first patches.
            mask_token: (1, 1, D), as wide as the first stage, needed with ``mask``.
        """
        if tuple(image.shape[1:]) != (self.in_chans, *self.img_size):
            raise ValueError(
                f"image of shape {tuple(image.shape)}: this encoder takes (B, {self.in_chans}, {self.img_size[0]}, "
                f"{self.img_size[1]}); build it with in_chans and img_size of the images, or crop them to it"
            )
        tokens = self.model.patch_embed(image)  # (B, h, w, D)
        if mask is not None:
            assert mask_token is not None, "a mask needs a mask token"
            place = mask.view(*tokens.shape[:3], 1)
            tokens = torch.where(place, mask_token.to(tokens.dtype)[:, :, None], tokens)
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for stage in self.model.layers:
            tokens = checkpoint(stage, tokens, use_reentrant=False) if recompute else stage(tokens)
        patches = self.model.norm(tokens).flatten(1, 2)  # (B, N, D)
        return Tokens(patches[:, :0], patches)

    def pool(self, tokens: Tokens) -> Tensor:
        """The feature of an image, (B, D): the mean of the last stage, as timm's own forward gives it."""
        return tokens.patches.mean(dim=1)


def _swin_name(name: str) -> str:
    import timm

    names = [known for known in timm.list_models("swin_*") if not known.startswith(("swin_s3", "swinv2"))]
    if name not in names:
        raise ValueError(f"name={name!r}: timm has no such Swin{nearest(name, names)}; allowed: {', '.join(names)}")
    return name


@cache
def _swin_sizes(name: str) -> dict[str, Any]:
    """Sizes that timm gives an architecture."""
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    return {
        "patch_size": model.patch_embed.patch_size[0],
        "window_size": model._ref_window_sizes[0][0],
        "embed_dim": model.embed_dim,
        "depths": tuple(len(stage.blocks) for stage in model.layers),
        "num_heads": tuple(stage.blocks[0].attn.num_heads for stage in model.layers),
    }
