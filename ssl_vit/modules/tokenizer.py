"""Visual tokenizers: pictures in, one code a patch out; files that are pinned by their hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit.config import Section
from ssl_vit.data.channels import normalised
from ssl_vit.encoders.base import Encoder, create_encoder
from ssl_vit.modules.dvae import DVAEQuantiser
from ssl_vit.modules.pixels import pixels_of
from ssl_vit.modules.vqkd import VQKDQuantiser

FILE = "tokenizer.safetensors"
QUANTISERS = {"vqkd": VQKDQuantiser, "dvae": DVAEQuantiser}
"""Kinds of our own tokenizers, and what stands behind their encoders."""


class TokenizerFile(Section):
    """A tokenizer, pinned by the hash of its file.

    Args:
        path: tokenizer.safetensors or its folder, as pipelines/train_tokenizer.py leaves in RUN/tokenizer; or the
            weights of OpenAI's DALL-E encoder
        sha256: of the file, as tokenizer.json beside it and result.json say
    """

    path: str | None = None
    sha256: str | None = None


class Tokenizer(nn.Module):
    """What every tokenizer promises; nothing of it is trained.

    Attributes:
        kind: vqkd, dvae or dalle.
        img_size: (H, W) of its pictures.
        grid_size: (h, w) of its codes.
        in_chans: channels of its pictures.
        vocab_size: number of codes.
    """

    kind: str
    img_size: tuple[int, int]
    grid_size: tuple[int, int]
    in_chans: int
    vocab_size: int

    @torch.no_grad()
    def tokens(self, image: Tensor) -> Tensor:
        """One code a patch.

        Args:
            image: (B, C, H, W), uint8, or floating point in [0, 1].

        Returns:
            int64 (B, N), patches row by row.

        Raises:
            ValueError: pictures of another size, or normalised ones.
        """
        pixels = pixels_of(image, (self.in_chans, *self.img_size))
        return self.codes_of(pixels.to(next(self.parameters()).dtype))

    def codes_of(self, pixels: Tensor) -> Tensor:
        """int64 (B, N) of pixels in [0, 1], (B, C, H, W)."""
        raise NotImplementedError

    def take(self, img_size: tuple[int, int]) -> None:
        """From now on take pictures of this size.

        Raises:
            ValueError: it takes others.
        """
        if img_size != self.img_size:
            raise ValueError(
                f"target_size={list(img_size)}: this tokenizer ({self.kind}) takes pictures of "
                f"{self.img_size[0]} x {self.img_size[1]}; give that, or null"
            )


class EncoderTokenizer(Tokenizer):
    """Our own tokenizers: an encoder and a quantiser of its patches, as ``tokenizer_training`` trained them.

    Args:
        encoder: any with patches.
        quantiser: of one of :data:`QUANTISERS`.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
    """

    def __init__(
        self,
        encoder: Encoder,
        quantiser: VQKDQuantiser | DVAEQuantiser,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.encoder, self.quantiser, self.mean, self.std = encoder, quantiser, mean, std
        self.kind = next(kind for kind, cls in QUANTISERS.items() if isinstance(quantiser, cls))
        self.img_size, self.grid_size, self.in_chans = encoder.img_size, encoder.grid_size, encoder.in_chans
        self.vocab_size = quantiser.config()["codebook_size"]

    def codes_of(self, pixels: Tensor) -> Tensor:
        """int64 (B, N) of pixels in [0, 1], (B, C, H, W)."""
        return self.quantiser.codes_of(self.encoder(normalised(pixels, self.mean, self.std)).patches)

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` builds this tokenizer from; plain types."""
        return {
            "kind": self.kind,
            "encoder": self.encoder.config(),
            "quantiser": self.quantiser.config(),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EncoderTokenizer:
        """The same tokenizer, its weights at random."""
        encoder = create_encoder(**config["encoder"])
        quantiser = QUANTISERS[config["kind"]](encoder.token_dim, **config["quantiser"])
        return cls(encoder, quantiser, tuple(config["mean"]), tuple(config["std"]))


def save_tokenizer(tokenizer: EncoderTokenizer, folder: Path) -> dict[str, Any]:
    """Write ``tokenizer.safetensors``, which says of itself what it is, and ``tokenizer.json`` for people.

    Args:
        tokenizer: whole, any device and precision; written in float32.
        folder: made if it is not there.

    Returns:
        Its ``config()`` with ``vocab_size, img_size, grid_size, file, sha256``.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    # the config lies in the hashed file, so one hash pins all of the tokenizer
    save_file(state, folder / FILE, metadata={"tokenizer": json.dumps(tokenizer.config(), sort_keys=True)})
    facts = {
        **tokenizer.config(),
        "vocab_size": tokenizer.vocab_size,
        "img_size": list(tokenizer.img_size),
        "grid_size": list(tokenizer.grid_size),
        "file": FILE,
        "sha256": file_hash(folder / FILE),
    }
    (folder / "tokenizer.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def load_tokenizer(chosen: TokenizerFile, key: str = "tokenizer") -> Tokenizer:
    """Read a tokenizer whose file has the stated hash; frozen, on the CPU.

    Args:
        chosen: path and hash.
        key: what messages call it.

    Raises:
        ValueError: no file, another hash (both are named), or a file that is no tokenizer.
    """
    file = _find(chosen.path, key)
    digest = file_hash(file)
    if chosen.sha256 is None:
        raise ValueError(f"{key}.sha256: is required, it pins the targets of a run; {file} has {key}.sha256={digest}")
    if chosen.sha256.lower() != digest:
        raise ValueError(
            f"{key}.sha256={chosen.sha256}: {file} has {digest}; it is another tokenizer: give the right file, or the "
            "new hash if you mean this one"
        )
    with torch.device("cpu"):
        tokenizer = _build(file, key)
    return tokenizer.requires_grad_(False).eval()


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(path: str | None, key: str) -> Path:
    if path is None:
        raise ValueError(
            f"{key}.path: is required: train a tokenizer with pipelines/train_tokenizer.py and give its RUN/tokenizer "
            f"as {key}.path (and the hash it prints as {key}.sha256); BEiT v1's is OpenAI's DALL-E encoder: save its "
            f"state dict as dalle_encoder.safetensors (see ssl_vit/modules/dalle.py) and give that file"
        )
    for file in (Path(path), Path(path) / FILE, Path(path) / "tokenizer" / FILE):
        if file.is_file():
            return file
    raise ValueError(
        f"{key}.path={path}: no such file; allowed: a run of pipelines/train_tokenizer.py, its tokenizer/ folder, "
        f"{FILE}, or the weights of OpenAI's DALL-E encoder (nothing is downloaded)"
    )


def _build(file: Path, key: str) -> Tokenizer:
    stated = _stated(file)
    if stated is None:
        from ssl_vit.modules.dalle import load_dalle

        return load_dalle(file, key)
    from safetensors.torch import load_file

    tokenizer = EncoderTokenizer.from_config(stated)
    tokenizer.load_state_dict(load_file(file))
    return tokenizer


def _stated(file: Path) -> dict[str, Any] | None:
    """What a safetensors file says of itself, None for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return json.loads(metadata["tokenizer"]) if "tokenizer" in metadata else None
