"""Features of a set: sample i goes to process i mod R, nothing is dropped or padded, bad samples are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_vit import distributed
from ssl_vit.config import InputError
from ssl_vit.data.bad_samples import BadReport
from ssl_vit.data.loader import Batch, EvalBatches, View, iterate
from ssl_vit.data.views import CentreView
from ssl_vit.data.workers import LoaderFailed

if TYPE_CHECKING:
    from ssl_vit.evaluation.base import Subject, Subset


@torch.no_grad()
def extract(subject: Subject, subset: Subset) -> tuple[Tensor, Tensor]:
    """Pooled features float32 (n, D) and labels int64 (n,) of the good samples, in their order, on every process."""
    return outputs(subject, subset, lambda batch: subject.pool(subject.objective(batch, call="encode")))


@torch.no_grad()
def outputs(
    subject: Subject,
    subset: Subset,
    forward: Callable[[dict[str, Tensor]], Tensor],
    view: View | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``forward`` makes of each sample of a set: each once, in their order, on every process.

    Every process makes the same number of forward calls, as sharded parameters need.

    Args:
        subject: what is judged; in eval mode meanwhile.
        subset: the samples.
        forward: batch (``image`` normalised, ``label`` int64) -> (B, D).
        view: default: the centre crop.
        seed: of a view with randomness.

    Returns:
        float32 (n, D) and labels int64 (n,) of the samples that decode.

    Raises:
        InputError: none does, or what ``forward`` makes of one is not finite.
    """
    rank, size = distributed.rank(), distributed.world_size()
    view = view or CentreView(subject.img_size, subject.pixels.crop_pct, subject.pixels.interpolation)
    mine = subset.samples[rank::size]
    batches = EvalBatches(subset.index, mine, view, subject.pixels, subject.batch_size, seed)
    calls = max(-(-len(subset.samples) // (size * subject.batch_size)), 1)
    blank, first_bad = _blank(subject), ""
    found = torch.zeros(0, device=subject.device)
    labels = torch.full((len(mine),), -1, device=subject.device)
    good = torch.zeros(len(mine), dtype=torch.bool, device=subject.device)
    was_training = subject.objective.training
    subject.objective.eval()
    for batch, reports in loaded(subject, batches, calls):
        if reports:
            first_bad = first_bad or f"; the first: {reports[0].name}: {reports[0].reason}"
        moved = subject.pixels.to_device(batch, subject.device) if batch else blank
        values = forward(moved).float()
        if not found.numel():
            found = values.new_zeros((len(mine), values.shape[1]))
        if batch:
            found[moved["index"]] = values
            labels[moved["index"]] = moved["label"]
            good[moved["index"]] = True
    subject.objective.train(was_training)
    total = len(subset.samples)
    everything = distributed.gather_interleaved(found, total)
    kept = distributed.gather_interleaved(good.to(torch.uint8), total).bool()
    if not kept.any():
        raise InputError(f"evaluation: none of the {total} images decodes{first_bad}")
    _check_finite(subset, everything, kept)
    subject.kept[id(subset)] = subset.samples[kept.cpu().numpy()]
    return everything[kept], distributed.gather_interleaved(labels, total)[kept]


def loaded(subject: Subject, batches: EvalBatches, calls: int) -> Iterator[tuple[Batch, list[BadReport]]]:
    """The batches of this process, then empty ones: ``calls`` in all, the same number on every process.

    Before any process goes on with a batch, all know whether each has one: none leaves the others waiting. All of it
    has to be taken: bad samples are reported behind the last.
    """
    loader = iterate(batches, range(len(batches)), subject.workers, stall_timeout=subject.stall_timeout)
    bad: list[BadReport] = []
    for _ in range(calls):
        batch, reports = {}, []
        try:
            batch, reports = next(loader, ({}, []))
        except LoaderFailed as error:
            subject.on_no_data(str(error))
        subject.pause_point()
        bad += reports
        yield batch, reports
    subject.on_bad(bad)


def _check_finite(subset: Subset, found: Tensor, good: Tensor) -> None:
    broken = (good & ~found.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(
            f"evaluation: what the encoder makes of {len(broken)} of {len(good)} images is not finite, first of "
            f"{subset.index.describe(int(subset.samples[broken[0]]))}; its weights or its precision are at fault"
        )


def _blank(subject: Subject) -> dict[str, Tensor]:
    shape = (1, subject.pixels.in_chans, *subject.img_size)
    return {
        "image": torch.zeros(shape, device=subject.device),
        "label": torch.zeros(1, dtype=torch.int64, device=subject.device),
    }
