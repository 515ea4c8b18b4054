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
        """Make the step, and undo it on the device if a gradient is not finite: nobody waits."""
        if self.found_inf is None:
            return super().step(closure)
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [(p.clone(), self._momentum(p).clone()) for p in moved]
        loss = super().step(closure)
        for parameter, (weight, momentum) in zip(moved, before, strict=True):
            for now, then in ((parameter, weight), (self._momentum(parameter), momentum)):
                now.copy_(torch.where(self.found_inf > 0, then, now))
        return loss

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        found = self.state[parameter].get("momentum_buffer")
        return torch.zeros_like(parameter) if found is None else found
