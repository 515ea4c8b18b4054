"""LARS (arXiv 1708.03888) of timm, which leaves out steps that were found not to be finite."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim.lars import Lars


class LARS(Lars):
    """timm's LARS; where ``found_inf`` is set, as fused optimizers of torch have it, a step moves nothing."""

    found_inf: Any = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make the step, and undo it on the device if a gradient is not finite: nobody waits.

        Momentum has to be there, see :func:`~ssl_vit.training.optim.begin_momentum`.
        """
        if self.found_inf is None:
            return super().step(closure)
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        tensors = [tensor for p in moved for tensor in (p, *self.state[p].values())]
        before = [tensor.clone() for tensor in tensors]
        loss = super().step(closure)
        for now, then in zip(tensors, before, strict=True):
            now.copy_(torch.where(self.found_inf > 0, then, now))
        return loss
