"""Losses of a student against a centred and sharpened teacher (DINO, arXiv 2104.14294; iBOT, arXiv 2111.07832)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ssl_vit.distributed import all_sum, world_size


class Centre(nn.Module):
    """The moving average of a teacher's logits, subtracted from them so that no prototype takes all.

    Sums are gathered over the micro-batches of a step and over the processes, and applied once; until then every
    micro-batch of every process sees the same centre.

    Args:
        dim: number of prototypes.
        momentum: share of the old centre that a step keeps.

    Raises:
        ValueError: an impossible momentum.
    """

    value: Tensor

    def __init__(self, dim: int, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"centre_momentum={momentum}: allowed: 0 to below 1, e.g. 0.9")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))
        self.reset()

    def reset(self) -> None:
        """Forget what was added since the last step."""
        # not a buffer: DDP would send the main process's part to all others
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, total: Tensor, count: int) -> None:
        """Note the sum (K,) of ``count`` logits of one micro-batch; every process adds as many."""
        self._sum, self._count = total if self._sum is None else self._sum + total, self._count + count

    def step(self, applied: Tensor) -> None:
        """Move to what was added; ``applied`` (): 0 leaves the centre as it is."""
        if self._sum is not None:
            mean = all_sum(self._sum) / (self._count * world_size())
            moved = self.value * self.momentum + mean * (1 - self.momentum)
            self.value.copy_(torch.where(applied > 0, moved, self.value))
        self.reset()


def check_temperatures(**temperatures: tuple[float, ...]) -> None:
    """All of them are above 0.

    Raises:
        ValueError: naming the argument.
    """
    for key, values in temperatures.items():
        if min(values) <= 0:
            raise ValueError(f"{key}={list(values)}: allowed: numbers above 0, e.g. 0.04")


def teacher_probabilities(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Softmax of centred and sharpened logits (..., K), at least in float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return ((wide - centre) / temperature).softmax(dim=-1)


def student_log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Logarithm of the softmax of logits (..., K), at least in float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide / temperature).log_softmax(dim=-1)


def cross_view_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean cross-entropy of every pair of a teacher's view and another view of the student (DINO, equation 3).

    Args:
        teacher: (B, T, K) probabilities.
        student: (B, S, K) logarithms of probabilities, its first T views those of the teacher.
    """
    # the sum over all views less the same one: no product of (B, T, S) pairs
    others = student.sum(dim=1, keepdim=True) - student[:, : teacher.shape[1]]
    return -(teacher * others).sum(dim=-1).mean() / (student.shape[1] - 1)


def masked_loss(teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    """Mean over views of the weighted cross-entropy of their patches (iBOT, equation 2).

    Args:
        teacher: (..., L, K) probabilities.
        student: (..., L, K) logarithms of probabilities.
        weight: (..., L), summing to 1 over the masked patches of a view and 0 elsewhere.
    """
    return -((teacher * student).sum(dim=-1) * weight).sum(dim=-1).mean()


def entropy(probabilities: Tensor) -> Tensor:
    """(..., K) to (...): 0 if all is on one prototype, ln K if it is spread evenly."""
    return torch.special.entr(probabilities).sum(dim=-1)


def collapse(values: dict[str, float], num_prototypes: int) -> str | None:
    """What is wrong if the student has nothing to learn: the teacher says less than 0.01 nats of its class tokens.

    Args:
        values: ``cls_kl`` and ``cls_entropy``, means over a batch.
        num_prototypes: of the head.
    """
    entropy, most = values["cls_entropy"], math.log(num_prototypes)
    if min(values["cls_kl"], entropy, most - entropy) >= 0.01:
        return None
    if entropy < most / 2:
        return (
            "collapse suspected: the teacher chooses the same prototypes for every image (cls_entropy or cls_kl near "
            "0); raise objective.teacher_temp, lower objective.centre_momentum or optim.base_lr"
        )
    return (
        f"collapse suspected: the teacher is undecided about every image (cls_entropy near ln {num_prototypes}, or "
        "cls_kl near 0); lower objective.teacher_temp, raise optim.batch_size or, for encoders narrower than 384, "
        "objective.init_std, or lower objective.momentum for a short run"
    )
