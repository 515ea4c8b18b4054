"""A sheet of nearest neighbours: what an encoder takes for alike, without a label."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ssl_vit import distributed
from ssl_vit.data.loader import EvalBatches
from ssl_vit.data.views import CentreView
from ssl_vit.evaluation.base import Evaluation, Subject
from ssl_vit.evaluation.features import loaded, outputs
from ssl_vit.evaluation.pictures import sheet, to_rgb


class Neighbours(Evaluation):
    """A row an image: the image, and those with the most similar features (cosine) among the images of the measure.

    Args:
        count: images, the same ones at every step.
        k: neighbours of each.
    """

    labelled = False

    def __init__(self, count: int = 8, k: int = 6) -> None:
        if count < 1 or k < 1:
            raise ValueError(f"count={count}, k={k}: should be at least 1")
        self.count, self.k = count, k

    def __call__(self, subject: Subject) -> dict[str, float]:
        """Saves ``pictures/neighbours_XXXXXXXX.png``; ``similarity``: the mean cosine of a shown neighbour."""
        rank, size = distributed.rank(), distributed.world_size()

        def features_and_places(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            pooled = subject.pool(subject.objective(batch, call="encode")).float()
            places = batch["index"] * size + rank if "index" in batch else torch.zeros_like(batch["label"])
            return torch.cat([pooled, places.to(pooled)[:, None]], dim=1)

        with torch.no_grad():
            found, _ = outputs(subject, subject.images, features_and_places)
        features, places = F.normalize(found[:, :-1], dim=1), found[:, -1].long().cpu()
        queries = torch.arange(min(self.count, len(features))) * len(features) // self.count
        similarity = features[queries] @ features.T
        similarity[torch.arange(len(queries)), queries] = -2.0  # not itself
        k = min(self.k, len(features) - 1)
        if k < 1:
            return {}
        values, neighbours = similarity.topk(k, dim=1)
        rows = torch.cat([queries[:, None], neighbours.cpu()], dim=1)  # (count, 1 + k)
        view = CentreView(subject.img_size, subject.pixels.crop_pct, subject.pixels.interpolation)
        chosen = subject.images.samples[places[rows.flatten()].numpy()]
        batches = EvalBatches(subject.images.index, chosen, view, subject.pixels, len(chosen))
        [(batch, _)] = loaded(subject, batches, 1)
        pictures = to_rgb(batch["image"].float() / 255).unflatten(0, rows.shape)
        subject.picture("neighbours", sheet(list(pictures.unbind(dim=1))))
        return {"similarity": values.mean().item()}
