"""timm's names and sizes of ViTs, and checks of sizes that encoders and decoders share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ssl_vit.config import nearest


@cache
def plain_names() -> tuple[str, ...]:
    """timm's plain ViTs that begin with vit_, and DeiT's with a distillation token."""
    import timm

    plain = (name for name in timm.list_models(module="vision_transformer") if name.startswith("vit_"))
    return (*plain, *timm.list_models("deit_*_distilled_*"))


@cache
def hybrid_names() -> tuple[str, ...]:
    """timm's ViTs on a residual network with group normalisation; batch normalisation is not exact over processes."""
    import timm

    return tuple(timm.list_models(["vit_*_r_s*", "vit_*_r[0-9]*_s*"], module="vision_transformer_hybrid"))


def timm_name(name: str, names: tuple[str, ...], allowed: str) -> str:
    """The timm architecture meant by ``name``: itself, or ``name`` with a size (224 if timm has that one).

    Args:
        name: what is asked for.
        names: architectures of this kind.
        allowed: what messages say of them.

    Raises:
        ValueError: ``name`` is none of them.
    """
    if name in names:
        return name
    sized = [known for known in names if known.rpartition("_")[0] == name and known.rpartition("_")[2].isdigit()]
    if sized:
        return min(sized, key=lambda known: (not known.endswith("_224"), known))
    raise ValueError(f"name={name!r}: timm has no such encoder{nearest(name, names)}; allowed: {allowed}")


@cache
def architecture_sizes(name: str) -> dict[str, int]:
    """``patch_size, embed_dim, depth, num_heads`` that timm gives an architecture, and ``stem_stride``.

    The latter is what a side of an image is divided by before the patches: 1 without a convolutional stem.
    """
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    patch = model.patch_embed.patch_size[0]
    return {
        "patch_size": patch,
        "stem_stride": model.patch_embed.feat_ratio() // patch,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
    }


def default_heads(embed_dim: int) -> int:
    """As many heads as make them 64 wide, or the next smaller width that divides ``embed_dim``."""
    return embed_dim // max(width for width in range(1, 65) if embed_dim % width == 0)


def check_sizes(prefix: str = "", **sizes: int | None) -> None:
    """Sizes are positive, and ``num_heads`` divides ``embed_dim`` where both are given.

    Args:
        prefix: of the arguments' names in messages, e.g. ``decoder_``.
        sizes: arguments by name; None is not checked.

    Raises:
        ValueError: naming the argument, its value and the nearest possible one.
    """
    for key, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{prefix}{key}={value}: allowed: whole numbers from 1; nearest: 1")
    width, heads = sizes.get("embed_dim"), sizes.get("num_heads")
    if width and heads and width % heads:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        raise ValueError(
            f"{prefix}num_heads={heads}: should divide {prefix}embed_dim={width}; "
            f"nearest: {min(divisors, key=lambda n: abs(n - heads))}"
        )


def check_drop_path(rate: float) -> None:
    """``drop_path_rate`` is a share below 1.

    Raises:
        ValueError: naming it.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate={rate}: allowed: 0 to below 1; nearest: 0.0")


def check_fc_norm(fc_norm: bool, global_pool: str) -> None:
    """A norm after the pooling is for the mean of patches.

    Raises:
        ValueError: naming both.
    """
    if fc_norm and global_pool != "avg":
        raise ValueError(f"fc_norm={fc_norm}: allowed with global_pool={global_pool!r}: false; or global_pool=avg")


def height_width(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a size that may be one number for both."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return int(height), int(width)


def check_img_size(img_size: tuple[int, int], stride: int, what: str) -> None:
    """Height and width are multiples of ``stride``, which messages call ``what``.

    Raises:
        ValueError: naming the side and the nearest possible one.
    """
    height, width = img_size
    for axis, pixels in (("height", height), ("width", width)):
        if pixels < stride or pixels % stride:
            shown = height if height == width else [height, width]
            near = max(round(pixels / stride), 1) * stride
            raise ValueError(f"img_size={shown}: its {axis} {pixels} should be a multiple of {what}; nearest: {near}")


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """``value`` is one of ``allowed``.

    Raises:
        ValueError: naming the argument, its value, what is allowed and the nearest.
    """
    if value not in allowed:
        raise ValueError(f"{key}={value!r}: allowed: {', '.join(allowed)}{nearest(str(value), allowed)}")
