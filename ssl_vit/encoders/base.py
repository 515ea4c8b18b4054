"""What every encoder promises: an image in, tokens out, and all that is needed to build it again."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from ssl_vit.config import nearest

FAMILIES = {
    "vit_*_r_s*": "ssl_vit.encoders.hybrid:Hybrid",
    "vit_*_r[0-9]*_s*": "ssl_vit.encoders.hybrid:Hybrid",
    "vit_*": "ssl_vit.encoders.vit:ViT",
    "deit_*": "ssl_vit.encoders.vit:ViT",
    "swin_*": "ssl_vit.encoders.swin:Swin",
    "resnet*": "ssl_vit.encoders.cnn:CNN",
    "beit_*": "ssl_vit.encoders.beit:BEiT",
    "beitv2_*": "ssl_vit.encoders.beit:BEiT",
}
"""Patterns of timm names and the class that builds them; the first that fits counts."""

BEFORE_BLOCKS = ("patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre")
"""First parts of the names of timm's parameters that work before the first block."""


class Tokens(NamedTuple):
    """The output of an encoder, final norm applied.

    Attributes:
        prefix: (B, P, D) class token and registers; P may be 0.
        patches: (B, N, D), row by row; (B, L, D) if patches were dropped.
    """

    prefix: Tensor
    patches: Tensor


class Encoder(nn.Module):
    """A network around a timm model, which is all that is exported.

    Attributes:
        model: the timm model.
        name: its timm architecture.
        embed_dim: width of the pooled feature.
        token_dim: width of the tokens.
        patch_size: pixels that an output token stands for, a side.
        mask_stride: pixels that an entry of a mask stands for, a side.
        grid_size: (h, w) patches.
        img_size: (H, W) pixels.
        in_chans: channels of the image.
        num_prefix_tokens: tokens before the patches.
        anchor: the parameter by which a file of weights is recognised.
        drops_patches: whether :meth:`forward_visible` exists, i.e. patches can be left out as if they were not there.
        any_size: whether images of other sizes are taken, see :meth:`take_any_size`.
        grad_checkpointing: whether activations are computed again in the backward pass.
    """

    model: Any
    name: str
    embed_dim: int
    token_dim: int
    patch_size: int
    mask_stride: int
    grid_size: tuple[int, int]
    img_size: tuple[int, int]
    in_chans: int
    num_prefix_tokens: int
    anchor: str = "patch_embed.proj.weight"
    drops_patches: bool = False
    any_size: bool = False
    grad_checkpointing: bool = False
    drop_path_rate: float = 0.0
    _arguments: dict[str, Any]
    """Constructor arguments beside those that every encoder has."""

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tokens:
        """Encode an image; masked patches are replaced by the mask token before the positions are added.

        Args:
            image: (B, C, H, W), normalised.
            mask: bool (B, N), True = masked.
            mask_token: (1, 1, D), needed with ``mask``.
        """
        raise NotImplementedError

    def forward_visible(self, image: Tensor, keep: Tensor) -> Tokens:
        """Encode some patches of an image as if the others did not exist.

        Args:
            image: (B, C, H, W), normalised.
            keep: int64 (B, L), indices of the visible patches; the tokens come in this order.
        """
        raise ValueError(f"encoder.name={self.name!r}: this encoder cannot drop patches; allowed: a plain vit_*")

    def take_any_size(self) -> None:
        """From now on take images of any multiples of ``patch_size``, their positions fitted to the grid.

        Other sizes are refused until then: mostly they are mistakes.

        Raises:
            ValueError: this encoder takes one size only.
        """
        raise ValueError(f"encoder.name={self.name!r}: this encoder takes images of one size only; allowed: a vit_*")

    @property
    def stages(self) -> list[nn.Module]:
        """What :meth:`intermediates` can look behind, in order: blocks; the stages of a Swin or ResNet."""
        return list(self.model.blocks)

    def intermediates(self, image: Tensor, stages: Sequence[int], norm: bool = True) -> list[Tokens]:
        """Tokens behind some stages of one forward pass, the final norm applied where their width is its.

        Args:
            image: (B, C, H, W), normalised.
            stages: numbers from 1, or from -1 backwards; the last gives what :meth:`forward` gives.
            norm: False: tokens as they leave their block, of the last one too.

        Raises:
            ValueError: there is no such stage.
        """
        modules = self.stages
        stages = [number_of(stage, len(modules), self.name) for stage in stages]
        outputs: dict[int, Tensor] = {}
        handles = []
        final = len(modules) if norm else 0
        for stage in sorted(set(stages) - {final}):

            def keep(_: nn.Module, __: tuple, output: Tensor, stage: int = stage) -> None:
                outputs[stage] = output

            handles.append(modules[stage - 1].register_forward_hook(keep))
        try:
            last = self(image)
        finally:
            for handle in handles:
                handle.remove()
        return [last if stage == final else self.tokens_of(outputs[stage], norm) for stage in stages]

    def tokens_of(self, output: Tensor, norm: bool = True) -> Tokens:
        """The output of a stage as tokens."""
        tokens = self.model.norm(output) if norm else output
        return Tokens(tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :])

    def pool(self, tokens: Tokens) -> Tensor:
        """The feature of an image, (B, D), as timm's own forward gives it: here the mean of the patches."""
        return tokens.patches.mean(dim=1)

    def check_image(self, image: Tensor) -> None:
        """Refuse images of other channels or another size than the encoder was built for.

        Raises:
            ValueError: saying which it takes.
        """
        if tuple(image.shape[1:]) != (self.in_chans, *self.img_size):
            raise ValueError(
                f"image of shape {tuple(image.shape)}: this encoder takes (B, {self.in_chans}, {self.img_size[0]}, "
                f"{self.img_size[1]}); build it with in_chans and img_size of the images, or crop them to it"
            )

    def fitted(
        self, state: dict[str, Tensor], grid: tuple[int, int] | None, where: str
    ) -> tuple[dict[str, Tensor], list[str]]:
        """A file's tensors as this encoder has them, and what was done: for positions of another kind or grid.

        Args:
            state: tensors under timm's names.
            grid: patch grid stated beside the file.
            where: what messages begin with.

        Raises:
            InputError: they cannot be made to fit.
        """
        return state, []

    def config(self) -> dict[str, Any]:
        """Constructor arguments that build this encoder again; plain types."""
        return {
            "name": self.name,
            "img_size": list(self.img_size),
            **self._arguments,
            "drop_path_rate": self.drop_path_rate,
            "grad_checkpointing": self.grad_checkpointing,
        }

    def timm_config(self) -> tuple[str, dict[str, Any]]:
        """Architecture and arguments with which ``timm.create_model`` alone builds ``self.model``."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """The number of the last layer: what comes after the blocks, and a classifier."""
        return len(self.model.blocks) + 1

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, for layer-wise learning rates (BEiT, arXiv 2106.08254, section A).

        Args:
            name: in this module, e.g. ``model.blocks.3.mlp.fc1.weight``.

        Returns:
            0: before the blocks; 1, 2 ...: a block; :attr:`num_layers`: after them.
        """
        part = name.removeprefix("model.").split(".")
        if part[0] == "blocks":
            return int(part[1]) + 1
        return 0 if part[0] in BEFORE_BLOCKS else self.num_layers

    def no_weight_decay(self) -> set[str]:
        """Parameter names that the supervised recipes of this architecture do not decay."""
        names = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in names}


def number_of(stage: int, count: int, name: str) -> int:
    """The number from 1 of a stage that may be counted from the end.

    Raises:
        ValueError: there is no such stage.
    """
    if not 1 <= abs(stage) <= count:
        raise ValueError(f"stage {stage}: allowed for {name}: 1 to {count}, or -1 to -{count} counted from the end")
    return stage if stage > 0 else count + 1 + stage


def encoder_class_of(name: str) -> type[Encoder]:
    """The class that builds the timm model ``name``.

    Raises:
        ValueError: no encoder of ours is built from it.
    """
    for pattern, target in FAMILIES.items():
        if fnmatchcase(name, pattern):
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)
    import timm

    names = timm.list_models(list(FAMILIES))
    raise ValueError(
        f"no encoder is built from {name!r}{nearest(name, names)}; allowed: timm names {', '.join(FAMILIES)}"
    )


def create_encoder(*, name: str, data: Any = None, **config: Any) -> Encoder:
    """Build an encoder from its name and the arguments of its class.

    Args:
        name: timm name.
        data: preprocessing stated beside the arguments by :func:`ssl_vit.encoders.weights.encoder_config`; not used.
        config: arguments of the class.

    Raises:
        ValueError: a name or argument that is not possible.
    """
    return encoder_class_of(name)(name=name, **config)
