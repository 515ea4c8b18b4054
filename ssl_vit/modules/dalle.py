"""The encoder of OpenAI's DALL-E dVAE, BEiT v1's tokenizer, from a local file.

The published ``encoder.pkl`` is a pickle of a whole module: reading it runs whatever code it names, so it is refused
here. Where its source is trusted, an environment with the package ``dall_e`` and torch below 2.6 makes it a plain file
of weights:

    from dall_e import load_model; from safetensors.torch import save_file
    state = load_model("encoder.pkl", "cpu").state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, "dalle_encoder.safetensors")
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.config import InputError
from ssl_vit.encoders.files import load_state
from ssl_vit.modules.tokenizer import Tokenizer

GROUPS = 4
EPSILON = 0.1
RECIPE = (
    "convert it once where its source is trusted, with the package dall_e and torch below 2.6: "
    "from dall_e import load_model; from safetensors.torch import save_file; "
    "save_file({k: v.contiguous() for k, v in load_model('encoder.pkl', 'cpu').state_dict().items()}, "
    "'dalle_encoder.safetensors')"
)


class Convolution(nn.Module):
    """A convolution that keeps the size, with the published names ``w`` and ``b``."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(outputs, inputs, side, side) * (inputs * side**2) ** -0.5)
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, image: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        return F.conv2d(image, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """A residual block with a bottleneck of a quarter of its width; all residuals together keep the scale."""

    def __init__(self, inputs: int, outputs: int, num_blocks: int) -> None:
        super().__init__()
        hidden = outputs // 4
        self.gain = num_blocks**-2
        self.id_path = nn.Identity() if inputs == outputs else Convolution(inputs, outputs, 1)
        widths = ((inputs, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, outputs, 1))
        layers: dict[str, nn.Module] = {}
        for i, sizes in enumerate(widths, start=1):
            layers |= {f"relu_{i}": nn.ReLU(), f"conv_{i}": Convolution(*sizes)}
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, image: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        return self.id_path(image) + self.gain * self.res_path(image)


class DalleTokenizer(Tokenizer):
    """The published convolutional encoder: 8 pixels a code, no normalisation but :meth:`map_pixels`.

    Args:
        img_size: (H, W) of the pictures, multiples of 8; BEiT takes 112 for 14 x 14 codes.
        width: channels of the first group.
        blocks_per_group: residual blocks in each of the four groups.
        in_chans: channels of the pictures.
        vocab_size: number of codes.
    """

    kind = "dalle"
    stride = 2 ** (GROUPS - 1)

    def __init__(
        self,
        img_size: tuple[int, int] = (112, 112),
        width: int = 256,
        blocks_per_group: int = 2,
        in_chans: int = 3,
        vocab_size: int = 8192,
    ) -> None:
        super().__init__()
        self.width, self.blocks_per_group = width, blocks_per_group
        self.in_chans, self.vocab_size = in_chans, vocab_size
        self.take(img_size)
        layers: dict[str, nn.Module] = {"input": Convolution(in_chans, width, 7)}
        before = width
        for group in range(1, GROUPS + 1):
            after = width * 2 ** (group - 1)
            parts: dict[str, nn.Module] = {}
            for i in range(1, blocks_per_group + 1):
                parts[f"block_{i}"] = Block(before if i == 1 else after, after, GROUPS * blocks_per_group)
            if group < GROUPS:
                parts["pool"] = nn.MaxPool2d(2)
            layers[f"group_{group}"], before = nn.Sequential(OrderedDict(parts)), after
        output: dict[str, nn.Module] = {"relu": nn.ReLU(), "conv": Convolution(before, vocab_size, 1)}
        layers["output"] = nn.Sequential(OrderedDict(output))
        self.blocks = nn.Sequential(OrderedDict(layers))

    def take(self, img_size: tuple[int, int]) -> None:
        """From now on take pictures of this size; a convolutional encoder has none of its own.

        Raises:
            ValueError: not multiples of 8.
        """
        if any(side < self.stride or side % self.stride for side in img_size):
            raise ValueError(f"target_size={list(img_size)}: should be multiples of {self.stride} for DALL-E's encoder")
        self.img_size = (img_size[0], img_size[1])
        self.grid_size = (img_size[0] // self.stride, img_size[1] // self.stride)

    @staticmethod
    def map_pixels(pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] as the published dVAE takes them: moved off 0 and 1 by ``(1 - 2 * 0.1) x + 0.1``."""
        return (1 - 2 * EPSILON) * pixels + EPSILON

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, K, h, w) of pixels in [0, 1]."""
        return self.blocks(self.map_pixels(pixels))

    def codes_of(self, pixels: Tensor) -> Tensor:
        """int64 (B, N) of pixels in [0, 1], (B, C, H, W)."""
        return self.logits(pixels).argmax(dim=1).flatten(1)


def load_dalle(file: Path, key: str) -> DalleTokenizer:
    """The published encoder from a state dict (``torch.save`` or safetensors).

    Raises:
        ValueError: a pickle of a whole module, or other tensors than the published encoder's.
    """
    try:
        state = load_state(file)
    except InputError as error:
        if any(words in str(error) for words in ("refused", "holds a ", "UnpicklingError")):
            raise ValueError(
                f"{key}.path={file}: a pickle of a whole module is refused, since reading it runs whatever code it "
                f"names; {RECIPE}; then give {key}.path=dalle_encoder.safetensors and its sha256 as {key}.sha256"
            ) from None
        raise ValueError(f"{key}.path={file}: {error}") from None
    first, last = state.get("blocks.input.w"), state.get("blocks.output.conv.w")
    if first is None or last is None:
        raise ValueError(
            f"{key}.path={file}: neither a tokenizer.safetensors of pipelines/train_tokenizer.py nor the "
            f"state dict of DALL-E's encoder (blocks.input.w ...); its names: {', '.join(list(state)[:4])}"
        )
    per_group = len({name.split(".")[2] for name in state if name.startswith("blocks.group_1.block_")})
    tokenizer = DalleTokenizer(
        width=first.shape[0], blocks_per_group=per_group, in_chans=first.shape[1], vocab_size=last.shape[0]
    )
    try:
        tokenizer.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{key}.path={file}: not DALL-E's encoder: {' '.join(str(error).split())[:400]}") from None
    return tokenizer
