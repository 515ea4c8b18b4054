"""ResNets of timm: teachers for DeiT, and what a supervised ViT is compared with."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from ssl_vit.config import nearest
from ssl_vit.encoders.architectures import check_drop_path, check_sizes, height_width
from ssl_vit.encoders.base import Encoder, Tokens

STRIDE = 32


@cache
def _names() -> tuple[str, ...]:
    import timm

    return tuple(timm.list_models("resnet*", module="resnet"))


class CNN(Encoder):
    """Residual network (arXiv 1512.03385) as timm builds it, for supervised training: it masks and drops nothing.

    Its places of 32 x 32 pixels are the patches, and it has no prefix tokens.

    Args:
        name: timm architecture, e.g. resnet18
        img_size: height and width in pixels, or one number for both
        in_chans: channels of the image
        channels: widths of the four stages; default: the architecture's
        layers: blocks of the four stages; default: the architecture's
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block
        grad_checkpointing: compute activations again in the backward pass; slower, less memory

    Raises:
        ValueError: an unknown name or an impossible value.
    """

    anchor = "conv1.weight"

    def __init__(
        self,
        name: str,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        channels: tuple[int, int, int, int] | None = None,
        layers: tuple[int, int, int, int] | None = None,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        import timm

        super().__init__()
        if name not in _names():
            raise ValueError(f"name={name!r}: timm has no such ResNet{nearest(name, _names())}; e.g. resnet18")
        check_drop_path(drop_path_rate)
        height, width = height_width(img_size)
        stages = {"channels": channels, "layers": layers}
        sizes = {f"{key}[{i}]": n for key, values in stages.items() for i, n in enumerate(values or ())}
        check_sizes("", in_chans=in_chans, **sizes, **{"img_size (height)": height, "img_size (width)": width})
        self.name, self.img_size, self.in_chans = name, (height, width), in_chans
        self._arguments = {
            "in_chans": in_chans,
            "channels": list(channels) if channels else None,
            "layers": list(layers) if layers else None,
        }
        self.drop_path_rate, self.grad_checkpointing = drop_path_rate, grad_checkpointing
        architecture, arguments = self.timm_config()
        self.model = timm.create_model(architecture, drop_path_rate=drop_path_rate, **arguments)
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.embed_dim = self.token_dim = int(self.model.num_features)
        self.patch_size, self.num_prefix_tokens = STRIDE, 0
        self.grid_size = (-(-self.img_size[0] // STRIDE), -(-self.img_size[1] // STRIDE))

    def timm_config(self) -> tuple[str, dict[str, Any]]:
        """Architecture and arguments with which ``timm.create_model`` alone builds ``self.model``."""
        given = {key: value for key, value in self._arguments.items() if value is not None}
        return self.name, {**given, "num_classes": 0}

    @property
    def num_layers(self) -> int:
        """The number of the last layer: a classifier."""
        return sum(len(stage) for stage in self.stages) + 1

    def layer_of(self, name: str) -> int:
        """The layer of a parameter: blocks counted over all stages."""
        part = name.removeprefix("model.").split(".")
        if not part[0].startswith("layer"):
            return 0
        stage = int(part[0].removeprefix("layer")) - 1
        return sum(len(other) for other in self.stages[:stage]) + int(part[1]) + 1

    @property
    def stages(self) -> list[Any]:
        """The four stages."""
        return [self.model.layer1, self.model.layer2, self.model.layer3, self.model.layer4]

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tokens:
        """Encode an image.

        Args:
            image: (B, C, H, W), normalised.
            mask: refused.
            mask_token: refused.
        """
        if mask is not None:
            raise ValueError(f"encoder.name={self.name!r}: this encoder masks nothing; allowed: a plain vit_*")
        return self.tokens_of(self.model.forward_features(image))

    def tokens_of(self, output: Tensor, norm: bool = True) -> Tokens:
        """The output (B, D, h, w) of a stage."""
        patches = output.flatten(2).transpose(1, 2)  # (B, N, D)
        return Tokens(patches[:, :0], patches)
