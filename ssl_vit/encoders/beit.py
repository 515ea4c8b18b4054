"""timm's BEiT encoders: relative positions that all blocks share or that each has for itself, and layer scale."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ssl_vit.config import nearest
from ssl_vit.encoders.architectures import (
    architecture_sizes,
    check_choice,
    check_drop_path,
    check_fc_norm,
    check_img_size,
    check_sizes,
    default_heads,
    height_width,
)
from ssl_vit.encoders.base import Encoder, Tokens
from ssl_vit.encoders.relative_positions import grid_of_table, resized_table
from ssl_vit.encoders.vit import run_blocks

TABLE, INDEX = "relative_position_bias_table", "relative_position_index"
SHARED = f"rel_pos_bias.{TABLE}"


class BEiT(Encoder):
    """BEiT's Vision Transformer (arXiv 2106.08254, sections 2.3 and 3.1) as timm builds it.

    Pretraining shares one table of relative positions over all blocks; fine-tuning gives each block its copy:
    ``encoder.init=RUN encoder.rel_pos=layer``. A table of another grid is resized on the way.

    Args:
        name: timm architecture, e.g. beit_base_patch16_224 or beitv2_large_patch16_224
        img_size: height and width in pixels, or one number for both
        patch_size: side of a patch in pixels; default: the architecture's
        in_chans: channels of the image
        embed_dim: width; default: the architecture's
        depth: number of blocks; default: the architecture's
        num_heads: attention heads; default: the architecture's, or with embed_dim given as many as make heads 64
            wide (or the next smaller width that divides it)
        mlp_ratio: hidden width of the MLPs over embed_dim; default: 4
        rel_pos: relative positions: shared by all blocks, of each layer for itself, or none
        abs_pos: learned absolute positions
        layer_scale: initial factor of each residual branch; 0: none; default: the architecture's
        global_pool: feature of the image: token: the class token; avg: mean of the patches, both after the final norm
        fc_norm: with global_pool=avg: the final norm comes after the mean, as BEiT fine-tunes; tokens stay without norm
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block
        grad_checkpointing: compute activations again in the backward pass; slower, much less memory

    Raises:
        ValueError: an unknown name or an impossible value.
    """

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
        rel_pos: Literal["shared", "layer", "none"] = "shared",
        abs_pos: bool = False,
        layer_scale: float | None = None,
        global_pool: Literal["token", "avg"] = "avg",
        fc_norm: bool = False,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.name = beit_name(name)
        check_sizes(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        check_choice("rel_pos", rel_pos, ("shared", "layer", "none"))
        check_choice("global_pool", global_pool, ("token", "avg"))
        check_fc_norm(fc_norm, global_pool)
        check_drop_path(drop_path_rate)
        if layer_scale is not None and layer_scale < 0:
            raise ValueError(f"layer_scale={layer_scale}: allowed: 0 (none) or more, e.g. 0.1; nearest: 0.0")
        if embed_dim is not None:
            num_heads = num_heads or default_heads(embed_dim)
        self.img_size, self.in_chans, self.global_pool = height_width(img_size), in_chans, global_pool
        self.drop_path_rate, self.grad_checkpointing = drop_path_rate, grad_checkpointing
        given = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        default = architecture_sizes(self.name)
        self._sizes = {key: default[key] if value is None else value for key, value in given.items()}
        self._rest = {"mlp_ratio": mlp_ratio, "rel_pos": rel_pos, "abs_pos": abs_pos, "layer_scale": layer_scale}
        self._arguments = {
            "in_chans": in_chans,
            **self._sizes,
            **self._rest,
            "global_pool": global_pool,
            "fc_norm": fc_norm,
        }
        self._build()

    def _build(self) -> None:
        import timm

        patch, embed_dim = self._sizes["patch_size"], self._sizes["embed_dim"]
        check_img_size(self.img_size, patch, f"patch_size={patch}")
        check_sizes(embed_dim=embed_dim, num_heads=self._sizes["num_heads"])
        architecture, arguments = self.timm_config()
        self.model = timm.create_model(architecture, drop_path_rate=self.drop_path_rate, **arguments)
        self.embed_dim = self.token_dim = embed_dim
        self.patch_size = self.mask_stride = patch
        self.num_prefix_tokens = 1
        self.grid_size = (self.img_size[0] // patch, self.img_size[1] // patch)

    def timm_config(self) -> tuple[str, dict[str, Any]]:
        """Architecture and arguments with which ``timm.create_model`` alone builds ``self.model``."""
        arguments: dict[str, Any] = {"img_size": self.img_size, "in_chans": self.in_chans, **self._sizes}
        if self._rest["mlp_ratio"] is not None:
            arguments["mlp_ratio"] = self._rest["mlp_ratio"]
        if self._rest["layer_scale"] is not None:
            arguments["init_values"] = self._rest["layer_scale"]
        return self.name, {
            **arguments,
            "use_abs_pos_emb": self._rest["abs_pos"],
            "use_rel_pos_bias": self._rest["rel_pos"] == "layer",
            "use_shared_rel_pos_bias": self._rest["rel_pos"] == "shared",
            "global_pool": self.global_pool,
            "use_fc_norm": self._arguments["fc_norm"],
            "num_classes": 0,
        }

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tokens:
        """Encode an image; masked patches are replaced by the mask token before any position is added.

        Args:
            image: (B, C, H, W), normalised.
            mask: bool (B, N), True = masked.
            mask_token: (1, 1, D), needed with ``mask``.
        """
        return self._finish(self.run(self.model.blocks, self.embed(image, mask, mask_token)))

    def forward_with_early(
        self, image: Tensor, mask: Tensor, mask_token: Tensor, early: int, blocks: nn.ModuleList
    ) -> tuple[Tokens, Tokens]:
        """The tokens, and those of BEiT v2's second path (arXiv 2208.06366, section 3.3).

        On the second path the class token of the last block meets the patches of an early one in some more blocks, so
        that what the masked patches lack has to come through the class token. Both paths share the final norm.

        Args:
            image: (B, C, H, W), normalised.
            mask: bool (B, N), True = masked.
            mask_token: (1, 1, D).
            early: number of blocks that the patches of the second path have passed.
            blocks: the further blocks, see :meth:`more_blocks`.
        """
        tokens = early_tokens = self.run(self.model.blocks[:early], self.embed(image, mask, mask_token))
        tokens = self.run(self.model.blocks[early:], tokens)
        second = self.run(blocks, torch.cat([tokens[:, :1], early_tokens[:, 1:]], dim=1))
        return self._finish(tokens), self._finish(second)

    def more_blocks(self, first: int, count: int) -> nn.ModuleList:
        """Blocks like the encoder's own, with the drop path rates of the blocks from number ``first`` on."""
        from timm.models.beit import Block

        depth = max(self._sizes["depth"], first + count)
        rates = torch.linspace(0, self.drop_path_rate, depth, device="cpu").tolist()[first : first + count]
        own, norm = self.model.blocks[0], partial(nn.LayerNorm, eps=self.model.blocks[0].norm1.eps)
        return nn.ModuleList(
            Block(
                self.embed_dim,
                self._sizes["num_heads"],
                qkv_bias=True,
                mlp_ratio=self._rest["mlp_ratio"] or 4.0,
                drop_path=rate,
                init_values=own.init_values,
                norm_layer=cast(type[nn.Module], norm),
                window_size=self.grid_size if self._rest["rel_pos"] == "layer" else None,
            )
            for rate in rates
        )

    def embed(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Class token and patches before the first block, (B, 1 + N, D)."""
        self.check_image(image)
        patches = self.model.patch_embed(image)  # (B, N, D)
        if mask is not None:
            assert mask_token is not None, "a mask needs a mask token"
            patches = torch.where(mask[..., None], mask_token.to(patches.dtype), patches)
        prefix = self.model.cls_token.expand(len(patches), -1, -1).to(patches.dtype)
        tokens = torch.cat([prefix, patches], dim=1)
        return tokens if self.model.pos_embed is None else tokens + self.model.pos_embed

    def run(self, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        """Apply blocks to (B, 1 + N, D), with the shared relative positions if there are any."""
        bias = self.model.rel_pos_bias() if self.model.rel_pos_bias is not None else None
        with_bias = [cast(nn.Module, partial(block, shared_rel_pos_bias=bias)) for block in blocks]
        return run_blocks(with_bias, tokens, self.grad_checkpointing)

    def _finish(self, tokens: Tensor) -> Tokens:
        tokens = self.model.norm(tokens)
        return Tokens(tokens[:, :1], tokens[:, 1:])

    def pool(self, tokens: Tokens) -> Tensor:
        """The feature of an image, (B, D), as timm's own forward gives it."""
        if self.global_pool == "token":
            return tokens.prefix[:, 0]
        return self.model.fc_norm(super().pool(tokens)) if self._arguments["fc_norm"] else super().pool(tokens)

    def fitted(
        self, state: dict[str, Tensor], grid: tuple[int, int] | None, where: str
    ) -> tuple[dict[str, Tensor], list[str]]:
        """A file's tensors with its relative positions as this encoder has them (``rel_pos`` and grid)."""
        state, notes = {name: t for name, t in state.items() if not name.endswith(INDEX)}, list[str]()
        if SHARED in state and self._rest["rel_pos"] == "layer":
            table = state.pop(SHARED)
            state |= {f"blocks.{i}.attn.{TABLE}": table.clone() for i in range(self._sizes["depth"])}
            notes.append("shared relative positions copied for each block")
        resized, change = 0, ""
        for name in [name for name in state if name.endswith(TABLE)]:
            source = grid_of_table(state[name], grid, self.grid_size, f"{where}: {name}")
            if source != self.grid_size:
                state[name], resized = resized_table(state[name], source, self.grid_size), resized + 1
                change = f"{source[0]}x{source[1]} to {self.grid_size[0]}x{self.grid_size[1]} patches"
        return state, [*notes, f"relative positions: {resized} tables resized, {change}"] if resized else notes


@cache
def _names() -> tuple[str, ...]:
    import timm

    return (*timm.list_models("beit_*"), *timm.list_models("beitv2_*"))


def beit_name(name: str) -> str:
    """The timm architecture meant by ``name``: itself, or ``name`` with the size 224.

    Raises:
        ValueError: timm has no such BEiT.
    """
    for known in (name, f"{name}_224"):
        if known in _names():
            return known
    raise ValueError(f"name={name!r}: timm has no such BEiT{nearest(name, _names())}; allowed: {', '.join(_names())}")
