"""Plain Vision Transformers of timm, with patch dropping before the projection."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssl_vit.encoders.architectures import (
    architecture_sizes,
    check_choice,
    check_drop_path,
    check_fc_norm,
    check_img_size,
    check_sizes,
    default_heads,
    height_width,
    plain_names,
    timm_name,
)
from ssl_vit.encoders.base import Encoder, Tokens
from ssl_vit.encoders.positions import resized_positions, row_column_table, sincos2d_table

POSITIONS = ("sincos2d", "learned", "learned2d", "none")


class ViT(Encoder):
    """Vision Transformer (arXiv 2010.11929) as timm builds it; all published checkpoints of MAE use this layout.

    Args:
        name: timm architecture, e.g. vit_base_patch16_224; the size at its end may be left out
        img_size: height and width in pixels, or one number for both
        patch_size: side of a patch in pixels; default: the architecture's
        in_chans: channels of the image
        embed_dim: width; default: the architecture's
        depth: number of blocks; default: the architecture's
        num_heads: attention heads; default: the architecture's, or with embed_dim given as many as make heads 64
            wide (or the next smaller width that divides it)
        mlp_ratio: hidden width of the MLPs over embed_dim; default: the architecture's
        pos_embed: sincos2d: fixed table of MAE; learned: trained, random at first; learned2d: likewise, a row and a
            column part; none: zeros
        class_token: put a class token in front
        global_pool: feature of the image: token: the class token (with a distillation token, the mean of both); avg:
            mean of the patches, both after the final norm
        fc_norm: with global_pool=avg: the final norm comes after the mean, as MAE fine-tunes; tokens stay without norm
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block
        grad_checkpointing: compute activations again in the backward pass; slower, much less memory

    Raises:
        ValueError: an unknown name or an impossible value.
    """

    drops_patches = True

    def __init__(
        self,
        name: str,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | None = None,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        pos_embed: Literal["sincos2d", "learned", "learned2d", "none"] = "sincos2d",
        class_token: bool = True,
        global_pool: Literal["token", "avg"] = "token",
        fc_norm: bool = False,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.name = self._timm_name(name)
        check_sizes(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        check_choice("pos_embed", pos_embed, POSITIONS)
        check_choice("global_pool", global_pool, ("token", "avg"))
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool='token': needs class_token=true; allowed without a class token: avg")
        check_fc_norm(fc_norm, global_pool)
        if "_distilled_" in self.name and (global_pool != "token" or not class_token):
            raise ValueError(
                f"global_pool={global_pool!r}, class_token={class_token}: allowed with {self.name}: 'token' and true"
            )
        check_drop_path(drop_path_rate)
        if embed_dim is not None:
            num_heads = num_heads or default_heads(embed_dim)
        self.img_size = height_width(img_size)
        self._given = {
            "in_chans": in_chans,
            "mlp_ratio": mlp_ratio,
            "class_token": class_token,
            "global_pool": global_pool,
            "fc_norm": fc_norm,
        }
        self.pos_embed, self.global_pool, self.drop_path_rate = pos_embed, global_pool, drop_path_rate
        self.grad_checkpointing = grad_checkpointing
        self._tables: dict[tuple[int, int], Tensor] = {}
        self._build({"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads})

    @staticmethod
    def _timm_name(name: str) -> str:
        return timm_name(
            name,
            plain_names(),
            "vit_{tiny,small,base,large,huge}_patch{8,14,16,32}_224 and the like, see timm.list_models('vit_*'), and "
            "deit_{tiny,small,base}_distilled_patch16_224",
        )

    def _build(self, sizes: dict[str, int | None]) -> None:
        import timm

        default = architecture_sizes(self.name)
        sizes = {key: default[key] if value is None else value for key, value in sizes.items()}
        patch, embed_dim, num_heads = (cast(int, sizes[key]) for key in ("patch_size", "embed_dim", "num_heads"))
        stride = patch * default["stem_stride"]
        check_img_size(
            self.img_size, stride, f"patch_size={patch}" if stride == patch else f"{stride}, the pixels of a patch"
        )
        check_sizes(embed_dim=embed_dim, num_heads=num_heads)
        self._arguments = {**self._given, **sizes}
        architecture, arguments = self.timm_config()
        self.model = timm.create_model(architecture, drop_path_rate=self.drop_path_rate, **arguments)
        self.embed_dim = self.token_dim = embed_dim
        self.patch_size, self.in_chans = stride, cast(int, self._given["in_chans"])
        self.mask_stride = stride
        self.grid_size = (self.img_size[0] // stride, self.img_size[1] // stride)
        self.num_prefix_tokens = cast(int, self.model.num_prefix_tokens)
        if self.pos_embed == "learned2d" and embed_dim % 2:
            raise ValueError(f"embed_dim={embed_dim}: allowed with pos_embed='learned2d': even numbers")
        self._fill_positions()

    @torch.no_grad()
    def _fill_positions(self) -> None:
        table, fixed = self.model.pos_embed, self.pos_embed in ("sincos2d", "none")
        if self.pos_embed == "sincos2d":
            table.copy_(self.position_table())
        elif self.pos_embed == "none":
            table.zero_()
        elif self.pos_embed == "learned2d":  # a column of the first row and a row of the first column, as far apart
            x, y = table[:, -math.prod(self.grid_size) :].unflatten(1, self.grid_size).chunk(2, dim=-1)
            x.copy_(x[:, :1].clone().expand_as(x))
            y.copy_(y[:, :, :1].clone().expand_as(y))
        table.requires_grad_(not fixed)

    def position_table(self) -> Tensor:
        """The fixed table of this grid, (1, P + N, D) (or (1, N, D) where prefix tokens have no position)."""
        return sincos2d_table(self.grid_size, self.embed_dim, self.num_positions_before_patches)

    def positions(self) -> Tensor:
        """The table that is added, (1, P + N, D) (or (1, N, D))."""
        table = self.model.pos_embed
        return row_column_table(table, self.grid_size) if self.pos_embed == "learned2d" else table

    @property
    def num_positions_before_patches(self) -> int:
        """Rows of the position table that belong to prefix tokens."""
        return 0 if self.model.no_embed_class else self.num_prefix_tokens

    def config(self) -> dict[str, Any]:
        """Constructor arguments that build this encoder again; plain types."""
        return {**super().config(), "pos_embed": self.pos_embed}

    def timm_config(self) -> tuple[str, dict[str, Any]]:
        """Architecture and arguments with which ``timm.create_model`` alone builds ``self.model``."""
        given = {key: value for key, value in self._arguments.items() if value is not None}
        return self.name, {**given, "img_size": self.img_size, "num_classes": 0}

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tokens:
        """Encode an image; masked patches are replaced by the mask token before the positions are added.

        Args:
            image: (B, C, H, W), normalised.
            mask: bool (B, N), True = masked.
            mask_token: (1, 1, D), needed with ``mask``.
        """
        self.check_image(image)
        patches = self.model.patch_embed(image)  # (B, N, D)
        if mask is not None:
            assert mask_token is not None, "a mask needs a mask token"
            patches = torch.where(mask[..., None], mask_token.to(patches.dtype), patches)
        return self._encode(patches + self._positions(image))

    def forward_visible(self, image: Tensor, keep: Tensor) -> Tokens:
        """Encode some patches of an image as if the others did not exist (MAE, section 3, "MAE encoder").

        Pixels of visible patches are gathered before the projection, so dropped patches cost nothing.

        Args:
            image: (B, C, H, W), normalised.
            keep: int64 (B, L), indices of the visible patches; the tokens come in this order.
        """
        self.check_image(image)
        embed = self.model.patch_embed
        (h, w), p = self.grid_size, self.patch_size
        grid = image.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, p), a view
        rows = torch.arange(len(image), device=image.device)[:, None]
        pixels = grid[rows, keep // w, keep % w].flatten(2)  # (B, L, C p p)
        patches = embed.norm(F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias))  # (B, L, D)
        return self._encode(patches + self.positions()[0, self.num_positions_before_patches :][keep])

    def pool(self, tokens: Tokens) -> Tensor:
        """The feature of an image, (B, D), as timm's own forward gives it."""
        if self.global_pool == "avg":
            return self.model.fc_norm(super().pool(tokens))
        return tokens.prefix.mean(dim=1) if hasattr(self.model, "dist_token") else tokens.prefix[:, 0]

    def take_any_size(self) -> None:
        """From now on take images of any multiples of ``patch_size``, their positions fitted to the grid."""
        self.any_size = True
        self.model.patch_embed.strict_img_size = False

    def _positions(self, image: Tensor) -> Tensor:
        """Positions of an image's patches, (1, N, D): of another grid resized, or computed anew if they are fixed."""
        table = self.positions()[:, self.num_positions_before_patches :]
        grid = (image.shape[2] // self.patch_size, image.shape[3] // self.patch_size)
        if grid == self.grid_size:
            return table
        if self.pos_embed != "sincos2d":
            return resized_positions(table, self.grid_size, grid)
        if grid not in self._tables:
            self._tables[grid] = sincos2d_table(grid, self.embed_dim)
        self._tables[grid] = self._tables[grid].to(table.device, non_blocking=table.device.type == "cuda")
        return self._tables[grid].to(table.dtype)

    def _encode(self, patches: Tensor) -> Tokens:
        """Blocks and final norm over prefix tokens and embedded patches (B, L, D)."""
        model, num_prefix = self.model, self.num_prefix_tokens
        names = ("cls_token", "dist_token", "reg_token")
        parts = [token for name in names if (token := getattr(model, name, None)) is not None]
        if parts:
            prefix = torch.cat(parts, dim=1)  # (1, P, D)
            if self.num_positions_before_patches:
                prefix = prefix + self.positions()[:, :num_prefix]
            patches = torch.cat([prefix.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1)
        tokens = run_blocks(model.blocks, model.norm_pre(patches), self.grad_checkpointing)
        tokens = model.norm(tokens)
        return Tokens(tokens[:, :num_prefix], tokens[:, num_prefix:])

    def check_image(self, image: Tensor) -> None:
        """Refuse images that do not fit; after :meth:`take_any_size` any multiples of ``patch_size`` do.

        Raises:
            ValueError: saying which it takes.
        """
        if self.any_size and image.shape[1] == self.in_chans and not any(n % self.patch_size for n in image.shape[2:]):
            return
        super().check_image(image)


def transformer_blocks(embed_dim: int, depth: int, num_heads: int, mlp_ratio: float) -> nn.ModuleList:
    """Pre-norm blocks as a plain ViT has them: biases everywhere, LayerNorm with eps 1e-6."""
    from timm.models.vision_transformer import Block

    arguments: dict[str, Any] = {"mlp_ratio": mlp_ratio, "qkv_bias": True}
    return nn.ModuleList(Block(embed_dim, num_heads, **arguments) for _ in range(depth))


def run_blocks(blocks: Iterable[nn.Module], tokens: Tensor, grad_checkpointing: bool = False) -> Tensor:
    """Apply blocks to tokens (B, T, D); with ``grad_checkpointing`` only the blocks' inputs are kept."""
    recompute = grad_checkpointing and torch.is_grad_enabled()
    for block in blocks:
        tokens = cast(Tensor, checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens))
    return tokens
