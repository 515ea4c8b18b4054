"""LARS (arXiv 1708.03888) of timm, which leaves out steps that were found not to be finite."""

from __future__ import annotations

from typing import Any

from timm.optim.lars import Lars


class LARS(Lars):
    """timm's LARS; where ``found_inf`` is set, as fused optimizers of torch have it, a step moves nothing."""

    found_inf: Any = None

    def step(self, closure: Any = None) -> Any:
        """Make the step, unless a gradient is not finite; this waits for the device."""
        if self.found_inf is not None and bool(self.found_inf):
            return None
        return super().step(closure)
