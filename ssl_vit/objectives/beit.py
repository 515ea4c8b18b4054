"""BEiT (arXiv 2106.08254) and BEiT v2 (arXiv 2208.06366): predict a tokenizer's codes of the masked patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.data.cropping import resize
from ssl_vit.data.masking import block_mask
from ssl_vit.data.views import BlockMaskedPair
from ssl_vit.encoders.base import Encoder
from ssl_vit.encoders.beit import BEiT as BEiTEncoder
from ssl_vit.modules.initialisation import initialise_beit, scale_residuals
from ssl_vit.modules.patches import gather_patches
from ssl_vit.modules.target_cache import state_hash
from ssl_vit.modules.tokenizer import TokenizerFile, load_tokenizer
from ssl_vit.objectives.base import Objective

NO_FILE = TokenizerFile()
EXTRA_BLOCKS = 2


class BEiT(Objective):
    """Masked image modelling on visual codes (v1: section 2; v2: sections 3.2 and 3.3).

    The mask token takes the place of masked patches before any position is added; the loss is the cross-entropy of the
    codes of the masked patches alone. v2 adds the same loss on a second path, in which early patches can learn what
    they lack from the last class token only.

    Args:
        encoder: a beit_* or beitv2_* encoder; without early_layer any that takes a mask token
        tokenizer: the file of the tokenizer, and the hash that pins it
        target_size: height and width of the tokenizer's picture; default: its own
        target_interpolation: filter of the tokenizer's picture
        num_masked: patches that are masked
        min_block: smallest area of a masked block, in patches
        max_block: largest area of a masked block; null: what is left to mask
        varying_count: v1: where no block fits, fewer are masked; v2 (false) fills up with single patches
        early_layer: v2: blocks that the patches of the second path pass; null: no second path
        color_jitter: strength of brightness, contrast and saturation jitter; 0: none
        crop_scale: smallest and largest share of the image's area that a crop covers
        crop_ratio: smallest and largest aspect ratio of a crop
        flip: probability of a horizontal flip
        interpolation: filter that resizes the encoder's crop
        target_cache: folder in which the tokenizer's codes are kept (with data.fixed_passes)

    Raises:
        ValueError: no tokenizer or one that does not fit, an encoder that cannot do it, or an impossible value.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: TokenizerFile = NO_FILE,
        target_size: int | tuple[int, int] | None = None,
        target_interpolation: Literal["lanczos", "bicubic", "bilinear"] = "bicubic",
        num_masked: int = 75,
        min_block: int = 16,
        max_block: int | None = None,
        varying_count: bool = False,
        early_layer: int | None = None,
        color_jitter: float = 0.4,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        target_cache: str | None = None,
    ) -> None:
        super().__init__(encoder)
        self.target_cache = target_cache
        if getattr(encoder, "mask_stride", None) != encoder.patch_size:
            raise ValueError(
                f"encoder.name={encoder.name!r}: BEiT predicts one code for each masked patch, and this "
                "encoder's output has another grid than its mask; allowed: beit_*, beitv2_*, vit_*"
            )
        if color_jitter < 0 or (color_jitter and encoder.in_chans not in (1, 3)):
            raise ValueError(
                f"color_jitter={color_jitter}: allowed: from 0, and only 0 for pictures of {encoder.in_chans} channels"
            )
        if varying_count:
            self.level_c = (*self.level_c, "objective.varying_count")
        self.num_masked, self.varying_count, self.early_layer = num_masked, varying_count, early_layer
        targets = load_tokenizer(tokenizer)
        size = (target_size, target_size) if isinstance(target_size, int) else target_size or targets.img_size
        self.view = BlockMaskedPair(
            encoder.img_size, crop_scale, crop_ratio, flip, interpolation, size, target_interpolation, color_jitter,
            encoder.grid_size, num_masked, min_block, max_block, exact=not varying_count,
        )  # fmt: skip
        targets.take(size)
        if targets.grid_size != encoder.grid_size or targets.in_chans != encoder.in_chans:
            raise ValueError(
                f"tokenizer.path={tokenizer.path}: gives {'x'.join(map(str, targets.grid_size))} codes of pictures "
                f"with {targets.in_chans} channels at target_size={list(size)}; this encoder has "
                f"{'x'.join(map(str, encoder.grid_size))} patches and in_chans={encoder.in_chans}"
            )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.token_dim))
        self.head = nn.Linear(encoder.token_dim, targets.vocab_size)
        initialise_beit(self)
        if early_layer is not None:
            if not isinstance(encoder, BEiTEncoder):
                raise ValueError(
                    f"early_layer={early_layer}: needs a beit_* or beitv2_* encoder, not {encoder.name!r}; allowed "
                    "with this one: null"
                )
            depth = len(encoder.model.blocks)
            if not 1 <= early_layer < depth:
                raise ValueError(f"early_layer={early_layer}: allowed: 1 to {depth - 1} for {depth} blocks, or null")
            # as released: these start as torch leaves Linear, with scaled residuals
            self.cls_blocks = encoder.more_blocks(early_layer, EXTRA_BLOCKS)
            scale_residuals(self.cls_blocks, first=early_layer + 1)
        self.tokenizer = targets
        self.freeze(self.tokenizer)

    def views(self, img_size: tuple[int, int]) -> BlockMaskedPair:
        """One crop and flip in two sizes, and a block-wise mask."""
        return replace(self.view, img_size=img_size)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the codes of the masked patches, mean over them; of both paths, summed (v2).

        Args:
            batch: ``image`` (B, C, H, W), normalised; ``target_image`` uint8, of the tokenizer's size; ``mask`` bool
                (B, N), True = masked.
        """
        mask = batch["mask"]
        if (
            type(mask) is Tensor
            and mask.device.type == "cpu"
            and (count := int(mask.sum(dim=1).max())) > self.num_masked
        ):
            raise ValueError(f"mask: {count} patches of a row; allowed: at most num_masked={self.num_masked}")
        # masked patches first, as many in each row: where fewer are masked the rest counts nothing, and nobody waits
        places = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.num_masked]  # (B, M)
        counted = mask.gather(1, places).flatten()
        codes = self.cached(batch, lambda: self.tokenizer.tokens(batch["target_image"]))  # (B, N)
        target = codes.gather(1, places).flatten()
        loss, metrics = torch.zeros((), device=target.device), {}
        for name, hidden in self._paths(batch).items():
            logits = self.head(gather_patches(hidden, places)).flatten(0, 1)  # (B M, K)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            each = F.cross_entropy(logits, target, reduction="none")
            loss = loss + (each * counted).sum() / counted.sum()
            metrics[f"{name}accuracy"] = ((logits.argmax(dim=1) == target) & counted).sum() / counted.sum()
        counts = torch.zeros(self.tokenizer.vocab_size, device=target.device).index_add(0, target, counted.float())
        metrics["commonest"] = counts.max() / counts.sum()
        return loss, metrics

    def predict(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``codes`` int64 (B, N) of ``target_image``, ``predicted`` ones, ``mask``, ``vocab_size``, and
        ``masked_accuracy``: the share of masked ones predicted, (B,).

        Pictures of another size are resized for the tokenizer; a batch without ``mask`` gets drawn ones.
        """
        image, view = batch["target_image"], self.view
        image = torch.stack([resize(one, view.target_size, view.target_interpolation) for one in image.cpu()])
        codes = self.tokenizer.tokens(image.to(batch["image"].device))
        if "mask" not in batch:
            drawn = [block_mask(view.grid_size, view.num_masked, view.min_block, view.max_block) for _ in image]
            batch = {**batch, "mask": torch.stack(drawn).to(codes.device)}
        predicted, mask = self.head(self._paths(batch)[""]).argmax(dim=-1), batch["mask"]
        share = ((predicted == codes) & mask).sum(dim=1) / mask.sum(dim=1)
        size = torch.tensor(self.tokenizer.vocab_size)
        return {"codes": codes, "predicted": predicted, "mask": mask, "vocab_size": size, "masked_accuracy": share}

    def target_facts(self) -> dict[str, Any]:
        """The tokenizer: its weights, and the size of its pictures."""
        return {"tokenizer": state_hash(self.tokenizer), "img_size": list(self.tokenizer.img_size)}

    def no_weight_decay(self) -> set[str]:
        """The class token and learned positions; mask token and relative positions are decayed, as released."""
        names = {"encoder.model.cls_token", "encoder.model.pos_embed"}
        return {name for name, _ in self.named_parameters() if name in names}

    def _paths(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Patches (B, N, D) of the encoder, and of the second path if there is one."""
        image, mask = batch["image"], batch["mask"]
        if self.early_layer is None:
            return {"": self.encoder(image, mask, self.mask_token).patches}
        assert isinstance(self.encoder, BEiTEncoder)
        tokens, second = self.encoder.forward_with_early(
            image, mask, self.mask_token, self.early_layer, self.cls_blocks
        )
        return {"": tokens.patches, "cls_": second.patches}
