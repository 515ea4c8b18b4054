"""Visual tokenizers in training: VQ-KD (BEiT v2, arXiv 2208.06366), or a discrete VAE on pixels (arXiv 2102.12092)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.data.channels import normalised
from ssl_vit.data.views import TargetView
from ssl_vit.encoders.architectures import check_choice, check_sizes
from ssl_vit.encoders.base import Encoder
from ssl_vit.modules.codebook import code_statistics
from ssl_vit.modules.dvae import DVAEDecoder, DVAEQuantiser
from ssl_vit.modules.feature_teacher import FeatureTeacher, FeatureTeacherSection
from ssl_vit.modules.pixels import pixels_of
from ssl_vit.modules.tokenizer import EncoderTokenizer, save_tokenizer
from ssl_vit.modules.vqkd import VQKDDecoder, VQKDQuantiser
from ssl_vit.objectives.base import Objective, Progress

NO_TEACHER = FeatureTeacherSection()


class TokenizerTraining(Objective):
    """Learns a tokenizer around the recipe's encoder and leaves it in RUN/tokenizer.

    Pictures go to the tokenizer and the teacher in pixels; each normalises them for itself.

    Args:
        encoder: the tokenizer's encoder, any with patches
        kind: vqkd: codes rebuild a teacher's features; dvae: codes rebuild the pixels, no teacher
        codebook_size: number of codes
        code_dim: width of a code
        decoder_embed_dim: width of the decoder: a ViT of vqkd, convolutions of dvae
        decoder_depth: blocks of the decoder
        decoder_num_heads: attention heads of vqkd's decoder
        teacher: vqkd: whose features are rebuilt
        decay: vqkd: of the codes' moving averages
        dead_below: vqkd: a code whose moving share falls below this part of an equal share is replaced by a feature;
            0: never, as published
        commitment: vqkd: weight of the distance between features and codes
        temperature: dvae: of the relaxed codes, at the start and from anneal on
        kl_weight: dvae: weight of the divergence from uniform codes, in nats an image over its values, from anneal on
        anneal: dvae: share of the run in which temperature falls and kl_weight rises, by half a cosine
        crop_scale: smallest and largest share of the image's area that a crop covers
        crop_ratio: smallest and largest aspect ratio of a crop
        flip: probability of a horizontal flip
        interpolation: filter that resizes a crop
        mean: per channel, of pixels in [0, 1], for the tokenizer's encoder; default 0.5
        std: per channel; default 0.5

    Raises:
        ValueError: vqkd without a teacher, or an impossible value.
    """

    level_c = ("encoder.drop_path_rate", "objective.codebook_size")

    def __init__(
        self,
        encoder: Encoder,
        kind: Literal["vqkd", "dvae"] = "vqkd",
        codebook_size: int = 8192,
        code_dim: int = 32,
        decoder_embed_dim: int = 768,
        decoder_depth: int = 3,
        decoder_num_heads: int = 12,
        teacher: FeatureTeacherSection = NO_TEACHER,
        decay: float = 0.99,
        dead_below: float = 0.0,
        commitment: float = 1.0,
        temperature: tuple[float, float] = (1.0, 0.0625),
        kl_weight: float = 0.0,
        anneal: float = 0.5,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(encoder)
        check_choice("kind", kind, ("vqkd", "dvae"))
        heads = decoder_num_heads if kind == "vqkd" else None
        check_sizes("decoder_", embed_dim=decoder_embed_dim, depth=decoder_depth, num_heads=heads)
        if [side * encoder.patch_size for side in encoder.grid_size] != list(encoder.img_size):
            raise ValueError(
                f"encoder.img_size={list(encoder.img_size)}: should be multiples of {encoder.patch_size}, the pixels "
                f"of one code of {encoder.name!r}"
            )
        if not (min(temperature) > 0 and 0 <= anneal <= 1 and kl_weight >= 0):
            raise ValueError(
                f"temperature={list(temperature)}, anneal={anneal}, kl_weight={kl_weight}: allowed: temperatures above "
                "0, anneal 0 to 1, kl_weight from 0"
            )
        self.kind, self.commitment, self.temperatures = kind, commitment, temperature
        self.kl_weight, self.anneal, self.kl_now = kl_weight, anneal, 0.0
        self.vocab_size = codebook_size
        self.view = TargetView(encoder.img_size, crop_scale, crop_ratio, flip, interpolation)
        half = (0.5,) * encoder.in_chans
        self.mean, self.std = tuple(mean or half), tuple(std or half)
        grid, sizes = encoder.grid_size, (decoder_embed_dim, decoder_depth)
        if kind == "vqkd":
            self.teacher = FeatureTeacher(teacher, grid, encoder.in_chans)
            self.freeze(self.teacher)
            self.quantiser = VQKDQuantiser(encoder.token_dim, codebook_size, code_dim, decay, dead_below)
            self.decoder = VQKDDecoder(grid, code_dim, self.teacher.dim, *sizes, decoder_num_heads)
        else:
            self.quantiser = DVAEQuantiser(encoder.token_dim, codebook_size, code_dim)
            self.decoder = DVAEDecoder(grid, code_dim, encoder.patch_size, encoder.in_chans, *sizes)

    def views(self, img_size: tuple[int, int]) -> TargetView:
        """Crop and flip."""
        return replace(self.view, img_size=img_size)

    def before_step(self, progress: Progress) -> None:
        """Temperature and weight of the divergence; the codebook begins a step."""
        if isinstance(self.quantiser, VQKDQuantiser):
            self.quantiser.codebook.begin(first_step=progress.step == 0)
            return
        share = min(progress.fraction / self.anneal, 1.0) if self.anneal else 1.0
        risen = 0.5 - 0.5 * math.cos(math.pi * share)
        first, last = self.temperatures
        self.quantiser.temperature, self.kl_now = first + (last - first) * risen, self.kl_weight * risen

    def after_step(self, applied: Tensor) -> None:
        """Move the codes of VQ-KD."""
        if isinstance(self.quantiser, VQKDQuantiser):
            self.quantiser.codebook.step(applied)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What the decoder lacks, plus the weighted commitment or divergence.

        Args:
            batch: ``target_image`` uint8 (B, C, H, W).
        """
        lack, penalty, codes = self._rebuild(batch["target_image"])
        lack = lack.mean()
        if self.kind == "vqkd":
            numbers = {"cosine": 1 - lack, "commitment": penalty}
            loss = lack + self.commitment * penalty
        else:
            penalty = penalty / batch["target_image"][0].numel()
            numbers = {"error": lack, "divergence": penalty}
            loss = lack + self.kl_now * penalty
        numbers |= code_statistics(codes, self.vocab_size)
        return loss, {name: value.detach() for name, value in numbers.items()}

    def predict(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``codes`` int64 (B, N) of ``target_image``, ``vocab_size``, and (B,) ``cosine`` or ``error``."""
        lack, _, codes = self._rebuild(batch["target_image"])
        lack = lack.flatten(1).mean(dim=1)
        own = {"cosine": 1 - lack} if self.kind == "vqkd" else {"error": lack}
        return {"codes": codes, "vocab_size": torch.tensor(self.vocab_size), **own}

    def _rebuild(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distance of what the codes rebuild from its target (B, ...), commitment or divergence, codes (B, N)."""
        pixels = pixels_of(image, (self.encoder.in_chans, *self.encoder.img_size))
        pixels = pixels.to(next(self.encoder.parameters()).dtype)
        ours = normalised(pixels, self.mean, self.std)
        quantised, penalty, codes = self.quantiser(self.encoder(ours).patches)
        rebuilt = self.decoder(quantised)
        rebuilt = rebuilt.to(torch.promote_types(rebuilt.dtype, torch.float32))
        if self.kind == "vqkd":
            lack = 1 - F.cosine_similarity(rebuilt, self.teacher(pixels).to(rebuilt.dtype), dim=-1)
        else:
            lack = (rebuilt - ours.to(rebuilt.dtype)).square()
        return lack, penalty, codes

    def tokenizer(self) -> EncoderTokenizer:
        """The part that is kept, sharing its weights with this objective."""
        return EncoderTokenizer(self.encoder, self.quantiser, self.mean, self.std)

    def hand_over(self, folder: Path) -> dict[str, Any]:
        """Write RUN/tokenizer; its facts, with the hash that pins it in a recipe."""
        return {"tokenizer": save_tokenizer(self.tokenizer(), folder / "tokenizer")}
