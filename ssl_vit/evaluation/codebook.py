"""What a tokenizer's codes are worth on held-out pictures: usage, entropy, what they rebuild, who predicts them."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ssl_vit.config import InputError
from ssl_vit.data.order import derive_seed
from ssl_vit.data.views import seed_generators
from ssl_vit.evaluation.base import Evaluation, Subject, Subset
from ssl_vit.evaluation.features import outputs

logger = logging.getLogger(__name__)
MASK_SEED = 4


def coded(subject: Subject, batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What an objective with a tokenizer predicts of normalised images, its ``codes`` among it.

    Args:
        subject: what is judged.
        batch: ``image`` (B, C, H, W), normalised.
        name: of the evaluation, for the message.

    Raises:
        InputError: the objective has no tokenizer.
    """
    mean, std = (
        torch.tensor(v, device=subject.device).view(-1, 1, 1) for v in (subject.pixels.mean, subject.pixels.std)
    )
    pixels = ((batch["image"] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    try:
        found = subject.objective({**batch, "target_image": pixels}, call="predict")
    except (KeyError, ValueError):
        found = {}
    if not isinstance(found, dict) or "codes" not in found:
        raise InputError(f"evals.{name}: needs objective.name=tokenizer_training or beit; leave it out")
    return dict(found)


class Codebook(Evaluation):
    """Codes of held-out pictures, for tokenizer_training and beit.

    Args:
        images: pictures of data.val (without it of data.train) that are looked at, at even distances
        warn_usage: warn when a smaller share of the codes occurs
        warn_perplexity: warn when the perplexity over the number of codes is smaller
    """

    labelled = False
    call = "predict"

    def __init__(self, images: int = 10_000, warn_usage: float = 0.5, warn_perplexity: float = 0.1) -> None:
        if images < 1:
            raise ValueError(f"images={images}: should be at least 1")
        self.images, self.warn_usage, self.warn_perplexity = images, warn_usage, warn_perplexity

    @torch.no_grad()
    def __call__(self, subject: Subject) -> dict[str, float]:
        """Usage, entropy and perplexity of the codes, the share of the commonest, and the objective's own numbers.

        ``usage`` is the share of all codes that occur, ``entropy`` in nats, ``perplexity`` its exponential,
        ``commonest`` what always guessing the commonest code would get right. tokenizer_training adds ``cosine`` or
        ``error``; beit adds ``masked_accuracy``, which should beat ``commonest``.
        """
        seed_generators(derive_seed(subject.seed, MASK_SEED))
        names: list[str] = []
        sizes: list[int] = []

        def codes_and_numbers(batch: dict[str, Tensor]) -> Tensor:
            found = coded(subject, batch, "codebook")
            codes = found.pop("codes")
            sizes[:] = [int(found.pop("vocab_size"))]
            names[:] = sorted(set(found) - {"predicted", "mask"})
            return torch.cat([codes.float(), *(found[name].float()[:, None] for name in names)], dim=1)

        whole = subject.images
        places = Subset.spread(whole.index, self.images) if len(whole.samples) > self.images else whole
        values, _ = outputs(subject, places, codes_and_numbers)
        codes = values[:, : values.shape[1] - len(names)].long().flatten()
        numbers = dict(zip(names, values[:, values.shape[1] - len(names) :].double().mean(dim=0).tolist(), strict=True))
        share = torch.bincount(codes, minlength=sizes[0]).double() / len(codes)
        entropy = float(-(share * share.clamp_min(1e-12).log()).sum())
        numbers |= {
            "usage": float((share > 0).double().mean()),
            "entropy": entropy,
            "perplexity": float(torch.tensor(entropy).exp()),
            "commonest": float(share.max()),
        }
        low = {
            "usage": (numbers["usage"], self.warn_usage),
            "perplexity over codebook_size": (numbers["perplexity"] / sizes[0], self.warn_perplexity),
        }
        for name, (value, threshold) in low.items():
            if value < threshold and subject.step:  # codes are random before the first step
                logger.warning(
                    "codebook: %s %.3f is below %.3f (%d codes, perplexity %.1f): targets are nearly trivial; "
                    "a smaller objective.codebook_size, a larger objective.dead_below or more varied images help",
                    name, value, threshold, sizes[0], numbers["perplexity"],
                )  # fmt: skip
        return numbers
