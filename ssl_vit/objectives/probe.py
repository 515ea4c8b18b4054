"""Classifiers on a frozen encoder, trained on augmented views: the published linear probes, and the attentive probe.

Several are trained together, each with its own input or learning rate and none changing another's gradients: BEiT's one
classifier a layer (arXiv 2106.08254), the learning rates of DINO and iBOT (2104.14294, 2111.07832), MAE's BatchNorm
without affine parts (2111.06377, section A.1), cross-attention over the patches (V-JEPA, 2404.08471, section 4).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ssl_vit.data.augment import AugmentSection, SupervisedView
from ssl_vit.encoders.base import Encoder, number_of
from ssl_vit.modules.pools import ATTENTIVE, OWN, POOLS, TOKENS_AVG, check_pools
from ssl_vit.modules.probe_head import ProbeHead
from ssl_vit.modules.supervised import check_classes
from ssl_vit.objectives.base import Objective


class Probe(Objective):
    """Classifiers on the tokens of a frozen encoder.

    Args:
        encoder: any encoder
        num_classes: default: the classes of data.train
        stages: blocks (stages of a Swin or ResNet) from 1, or from -1 backwards; each gets classifiers of its own; a
            list of several: their features side by side; null: each block for itself
        pools: pool: the encoder's own feature, of the last block; token: class token; avg: mean of the patches; both:
            side by side; tokens_avg: class tokens of all blocks of an entry of stages and the mean of the last one's
            patches; attentive: a learned query attends to the patches; each gets classifiers of its own
        final_norm: the encoder's last norm is applied to the tokens of every block; false: tokens as they leave a block
        learning_rates: factors of the learning rate; each gets classifiers of its own
        batch_norm: normalise features over the batch first, without affine parts
        head_std: standard deviation of the classifiers' initial weights; 0: zeros
        augment: what happens to each image

    Raises:
        ValueError: an impossible value.
    """

    level_c = ("objective.batch_norm",)

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int | None = None,
        stages: list[int | list[int]] | None = [-1],  # noqa: B006
        pools: list[str] = ["pool"],  # noqa: B006
        final_norm: bool = True,
        learning_rates: list[float] = [1.0],  # noqa: B006
        batch_norm: bool = False,
        head_std: float = 0.01,
        augment: AugmentSection = AugmentSection(),  # noqa: B008
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__(encoder)
        num_classes = check_classes(num_classes)
        check_pools(pools, (OWN, *POOLS, TOKENS_AVG, ATTENTIVE))
        if OWN in pools and not final_norm:
            raise ValueError(f"pools={pools} with final_norm=false: the encoder's own feature is behind its norm")
        if not learning_rates or min(learning_rates) <= 0:
            raise ValueError(f"learning_rates={learning_rates}: allowed: positive factors, e.g. [0.1, 1.0, 10.0]")
        self.freeze(encoder)
        self.final_norm = final_norm
        self.view = SupervisedView(encoder.img_size, mean=mean, std=std, **dict(augment))
        self.heads, self.factors = nn.ModuleDict(), dict[str, float]()
        widths = self._widths(encoder)
        for blocks in self._numbers(encoder, stages):
            for pool in pools:
                if pool == OWN and blocks != [len(encoder.stages)]:
                    raise ValueError(f"stages={blocks} with pools={pool}: the encoder's own feature is that of "
                                     "its last block; allowed with others: token, avg, both, attentive")  # fmt: skip
                if pool in ("token", "both", TOKENS_AVG) and not encoder.num_prefix_tokens:
                    raise ValueError(f"pools={pool}: {encoder.name} has no class token; allowed: pool, avg, attentive")
                width = sum(widths[stage] for stage in blocks) * (1 + (pool == "both"))
                width += widths[blocks[-1]] if pool == TOKENS_AVG else 0
                width = encoder.embed_dim if pool == OWN else width
                for factor in learning_rates:
                    name = f"stage_{'_'.join(map(str, blocks))}_{pool}"
                    name += f"_lr{factor:g}".replace(".", "p") if len(learning_rates) > 1 else ""
                    self.heads[name] = ProbeHead(blocks, pool, width, num_classes, batch_norm, head_std)
                    self.factors[name] = factor

    @staticmethod
    def _numbers(encoder: Encoder, stages: list[int | list[int]] | None) -> list[list[int]]:
        """The blocks of each input, numbered from 1."""
        count = len(encoder.stages)
        stages = list(range(1, count + 1)) if stages is None else stages
        inputs = [[entry] if isinstance(entry, int) else list(entry) for entry in stages]
        if not inputs or not all(inputs):
            raise ValueError(f"stages={stages}: allowed: block numbers or lists of them, e.g. [-1] or [[-2, -1]]")
        return [[number_of(stage, count, encoder.name) for stage in blocks] for blocks in inputs]

    @staticmethod
    def _widths(encoder: Encoder) -> dict[int, int]:
        """The width of the tokens behind each block."""
        parameter = next(encoder.parameters())
        count, chans = len(encoder.stages), encoder.in_chans
        with torch.no_grad():
            blank = torch.zeros(1, chans, *encoder.img_size, device=parameter.device, dtype=parameter.dtype)
            found = encoder.eval().intermediates(blank, range(1, count + 1))
        return {stage: tokens.patches.shape[2] for stage, tokens in enumerate(found, 1)}

    def _logits(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        heads = {name: cast(ProbeHead, head) for name, head in self.heads.items()}
        last = len(self.encoder.stages)
        stages = sorted({last, *(stage for head in heads.values() for stage in head.stages)})
        with torch.no_grad():
            tokens = dict(zip(stages, self.intermediates(batch, stages, self.final_norm), strict=True))
            own = self.encoder.pool(tokens[last]) if self.final_norm else tokens[last].patches[:, 0]
        return {name: head(tokens, own) for name, head in heads.items()}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the cross-entropies, so that each classifier has the gradients it would have alone.

        Args:
            batch: ``image`` (B, C, H, W), normalised; ``label`` int64 (B,).
        """
        losses = {
            name: nn.functional.cross_entropy(logits.float(), batch["label"])
            for name, logits in self._logits(batch).items()
        }
        return torch.stack(list(losses.values())).sum(), {"least": torch.stack(list(losses.values())).detach().min()}

    def decide(self, batch: dict[str, Tensor]) -> Tensor:
        """The class that each classifier says, int64 (B, number of heads)."""
        return torch.stack([logits.argmax(dim=1) for logits in self._logits(batch).values()], dim=1)

    def lr_factor(self, name: str) -> float:
        """The factor of the classifier that a parameter belongs to."""
        part = name.split(".")
        return self.factors[part[1]] if part[0] == "heads" else 1.0

    def hand_over(self, folder: Any) -> dict[str, Any]:
        """The names of the classifiers, in the order of their numbers."""
        return {"heads": list(self.heads)}
