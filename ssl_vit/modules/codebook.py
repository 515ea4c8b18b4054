"""BEiT v2's codebook (arXiv 2208.06366, section 2.2): unit vectors that follow the features assigned to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit import distributed

KMEANS_ROUNDS = 10


class Codebook(nn.Module):
    """Codes on the unit sphere, moved by exponential averages instead of gradients.

    vector-quantize-pytorch moves its codes inside the forward pass, with each micro-batch and also when the optimizer
    skips the step, and weighs its averages by cluster size; here they move once a step by the released formula.

    Args:
        size: number of codes K.
        dim: width of a code.
        decay: of the averages, once a step.
        dead_below: a code whose average share of the features falls below this part of an equal share (1 / K) is
            replaced by a feature of the step; 0: never.
    """

    codes: Tensor
    share: Tensor
    started: Tensor

    def __init__(self, size: int, dim: int, decay: float = 0.99, dead_below: float = 0.0) -> None:
        super().__init__()
        if size < 2:
            raise ValueError(f"codebook_size={size}: allowed: whole numbers from 2; nearest: 2")
        if dim < 1:
            raise ValueError(f"code_dim={dim}: allowed: whole numbers from 1; nearest: 1")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: allowed: 0 to below 1; nearest: 0.99")
        if not 0 <= dead_below < 1:
            raise ValueError(f"dead_below={dead_below}: allowed: 0 (never) to below 1; nearest: 0.0")
        self.size, self.dim, self.decay, self.dead_below = size, dim, decay, dead_below
        self.register_buffer("codes", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("share", torch.full((size,), 1 / size))
        self.register_buffer("started", torch.zeros(()))
        self._may_start = False
        # sums over the micro-batches of a step; not buffers, or DDP would copy those of one process to the others
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None
        self._features: Tensor | None = None

    def begin(self, first_step: bool) -> None:
        """Forget the sums of an earlier step; ``first_step``: the run's first, in which codes may start."""
        self._counts = self._sums = self._features = None
        self._may_start = first_step

    def lookup(self, features: Tensor) -> Tensor:
        """The nearest codes, int64 (...), of unit features (..., d)."""
        return (features @ self.codes.to(features.dtype).T).argmax(dim=-1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise.

        Args:
            features: (B, N, d), not normalised.

        Returns:
            Codes (B, N, d) with the gradient of the features (straight through), the commitment: mean square of unit
            features minus their codes, and the codes' numbers, int64 (B, N).
        """
        unit = F.normalize(features, dim=-1)
        if self.training and self._may_start:
            self._start(unit.detach().flatten(0, 1))
        numbers = self.lookup(unit.detach())
        nearest = self.codes.to(unit.dtype)[numbers]
        if self.training:
            self._collect(unit.detach().flatten(0, 1), numbers.flatten())
        return unit + (nearest - unit).detach(), (unit - nearest).square().mean(), numbers

    @torch.no_grad()
    def _collect(self, unit: Tensor, numbers: Tensor) -> None:
        unit = unit.to(self.codes.dtype)
        if self._counts is None or self._sums is None:
            self._counts, self._sums = torch.zeros_like(self.share), torch.zeros_like(self.codes)
        self._counts = self._counts.index_add(0, numbers, torch.ones_like(unit[:, 0]))
        self._sums = self._sums.index_add(0, numbers, unit)
        self._features = unit

    @torch.no_grad()
    def step(self, applied: Tensor) -> None:
        """Move the codes by the features since :meth:`begin`, over all processes; nothing moves if ``applied`` is 0.

        A code with features goes to the unit mean of them, ``codes = unit(decay codes + (1 - decay) unit(mean))``; one
        without stays.
        """
        if self._counts is None or self._sums is None or self._features is None:
            return
        counts, sums = distributed.all_sum(self._counts), distributed.all_sum(self._sums)
        used = (counts > 0)[:, None]
        target = torch.where(used, F.normalize(sums, dim=1), self.codes)
        codes = F.normalize(self.decay * self.codes + (1 - self.decay) * target, dim=1)
        share = self.decay * self.share + (1 - self.decay) * counts / counts.sum()
        if self.dead_below:
            dead = share < self.dead_below / self.size
            codes = torch.where(dead[:, None], self._drawn(self._features), codes)
            share = torch.where(dead, 1 / self.size, share)
        made = (applied > 0) & codes.isfinite().all()
        self.codes.copy_(torch.where(made, codes, self.codes))
        self.share.copy_(torch.where(made, share, self.share))
        self.begin(first_step=False)

    def _drawn(self, unit: Tensor) -> Tensor:
        """``size`` features drawn from all processes' (n, d), the same everywhere; each gives an equal part of them."""
        rank, world = distributed.rank(), distributed.world_size()
        mine = torch.arange(self.size, device=unit.device) % world == rank
        order = torch.randperm(len(unit), device=unit.device)
        picked = unit[order[torch.arange(self.size, device=unit.device) // world % len(unit)]]
        return distributed.all_sum(torch.where(mine[:, None], picked, 0.0))

    @torch.no_grad()
    def _start(self, unit: Tensor) -> None:
        """Codes from the first features: spherical k-means over all processes (released: each process for itself)."""
        if bool(self.started):  # waits for the device, in the first step only
            return
        unit = unit.to(self.codes.dtype)
        means = self._drawn(unit)
        for _ in range(KMEANS_ROUNDS):
            numbers = (unit @ means.T).argmax(dim=1)
            ones = torch.ones_like(unit[:, 0])
            counts = distributed.all_sum(torch.zeros_like(self.share).index_add(0, numbers, ones))
            sums = distributed.all_sum(torch.zeros_like(means).index_add(0, numbers, unit))
            means = torch.where((counts > 0)[:, None], F.normalize(sums, dim=1), means)
        fine = means.isfinite().all()
        self.codes.copy_(torch.where(fine, means, self.codes))
        self.started.copy_(fine.to(self.started.dtype))


def code_statistics(codes: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """Of the codes of a batch: the share of all codes that occur, and the perplexity of their distribution."""
    counts = torch.zeros(vocab_size, device=codes.device).index_add(
        0, codes.flatten(), torch.ones_like(codes.flatten(), dtype=torch.float32)
    )
    share = counts / counts.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"usage": (counts > 0).float().mean(), "perplexity": entropy.exp()}
