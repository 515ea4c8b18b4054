"""Teachers that are the exponential moving average of a student."""

# pyright: reportPrivateImportUsage=false
# torch has no public names for its operations on lists of tensors
from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Keeps a network at the exponential moving average of another's weights (Mean Teacher, arXiv 1703.01780).

    Not a module: both networks belong to the objective, whose state holds them. Averaged tensors are looked up in
    each update, so both may be moved, cast or sharded in between.

    Args:
        teacher: the average; it is frozen here. An objective also registers it with ``freeze`` to keep it in eval mode.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher.requires_grad_(False).eval()

    @torch.no_grad()
    def copy(self, student: nn.Module) -> None:
        """Start the average at the student's weights and buffers."""
        self.teacher.load_state_dict(student.state_dict())

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float, applied: Tensor) -> None:
        """``teacher = m * teacher + (1 - m) * student`` for parameters, a copy for buffers; nothing waits for a device.

        Args:
            student: a network of the same layout.
            momentum: m.
            applied: (), 1: average; 0: leave everything as it is.
        """
        averages: list[Tensor] = list(self.teacher.parameters())
        weights: list[Tensor] = list(student.parameters())
        # one rounding each, from float64, as if the factors were numbers: at m near 1 it shows
        gain = applied.double() * (1 - momentum)
        kept, gain = (1 - gain).to(averages[0].dtype), gain.to(averages[0].dtype)
        added = torch._foreach_mul(weights, gain)
        torch._foreach_mul_(averages, kept)
        torch._foreach_add_(averages, added)
        for average, value in zip(self.teacher.buffers(), student.buffers(), strict=True):
            average.copy_(torch.where(applied > 0, value, average))
