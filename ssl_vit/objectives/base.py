"""What every objective promises: a batch in, a loss out, and every call that touches weights through one door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ssl_vit.config import nearest
from ssl_vit.encoders.base import Encoder, Tokens
from ssl_vit.modules.target_cache import TargetCache

CALLS = ("loss", "encode", "intermediates", "predict", "decide", "pictures")
"""What ``objective(batch, call=...)`` may ask for; an objective has those of which it defines the method."""


class Progress(NamedTuple):
    """Where a run stands; everything scheduled is a function of it.

    Attributes:
        step: optimizer steps done.
        total_steps: steps of the whole run.
        epoch: passes over the data done, with fraction.
        total_epochs: passes of the whole run.
        fraction: share of the run done, 0 to 1.
    """

    step: int
    total_steps: int
    epoch: float
    total_epochs: float
    fraction: float


class Objective(nn.Module):
    """A training objective; as it is, an encoder to be measured.

    ``resting``, set by before_step, are parameters that the next step leaves alone although they have gradients.

    What a new objective defines, and who calls it:

        views(img_size)         run        picklable callable, decoded sample -> dict of tensors (no batch axis)
        loss(batch)             trainer    (scalar loss, {name: detached scalar}); no ``.item()``
        predict(batch)          evaluations, its output for each image; optional
        decide(batch)           evaluations, the class that each of several ``heads`` says; optional
        pictures(batch)         evaluations, {name: (B, C, H, W)} in the image's own scale; optional
        before_step(progress)   trainer    sets all that is scheduled
        after_step(applied)     trainer    EMA, centres
        encoder_filled()        build      encoder.init has filled the encoder; copies of it follow
        symptom(values)         trainer    what is wrong, if the logged numbers tell; a warning
        target_facts()          run        what fixed targets depend on beside views and data; needed with target_cache
        hand_over(folder)       report     writes what a finished run leaves beside its encoder; facts for result.json
        lr_factor(name)         optimizer  factor of a parameter's learning rate
        no_weight_decay()       optimizer  parameter names exempt beside biases and 1-D parameters

    Args:
        encoder: what is trained, measured and exported
    """

    level_c: tuple[str, ...] = ("encoder.drop_path_rate",)
    """Recipe keys that, unless 0 or false, make runs with another layout equal in distribution only."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.resting: tuple[nn.Parameter, ...] = ()
        self._frozen: list[nn.Module] = []
        self.target_cache: str | None = None
        self.targets: TargetCache | None = None

    def forward(self, batch: dict[str, Tensor], call: str = "loss", **options: Any) -> Any:
        """Run ``call`` on a batch, with its options: the only door to the weights, so that wrappers see every use.

        Raises:
            ValueError: this objective has no such call.
        """
        method = getattr(self, call, None) if call in CALLS else None
        if method is None:
            known = [name for name in CALLS if hasattr(self, name)]
            raise ValueError(
                f"call={call!r}: {type(self).__name__} has no such call{nearest(call, known)}; "
                f"allowed: {', '.join(known)}"
            )
        return method(batch, **options)

    def encode(self, batch: dict[str, Tensor]) -> Tokens:
        """Tokens of ``batch["image"]`` (B, C, H, W), nothing masked."""
        return self.encoder(batch["image"])

    def intermediates(self, batch: dict[str, Tensor], stages: Sequence[int], norm: bool = True) -> list[Tokens]:
        """Tokens behind some stages of the encoder, see :meth:`ssl_vit.encoders.base.Encoder.intermediates`."""
        return self.encoder.intermediates(batch["image"], stages, norm)

    def views(self, img_size: tuple[int, int]) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
        """The training view of this objective: ``self.view`` at a size, unless more of it depends on the size."""
        view = getattr(self, "view", None)
        if view is None:
            raise ValueError(f"{type(self).__name__} has no training view: it can be measured, not trained")
        return replace(view, img_size=img_size)

    def before_step(self, progress: Progress) -> None:
        """Set whatever is scheduled, as a function of ``progress`` alone."""

    def after_step(self, applied: Tensor) -> None:
        """Update whatever is not a gradient's business, once for each optimizer step.

        Args:
            applied: scalar on the device, 1 if the optimizer made its step, 0 if it was skipped: then nothing may move.
        """

    def symptom(self, values: dict[str, float]) -> str | None:
        """What the numbers of a logged step say is wrong, and the knobs that may help; None: nothing.

        Args:
            values: ``loss`` and the metrics of :meth:`loss`, means over the processes.
        """
        return None

    def encoder_filled(self) -> None:
        """Called once after ``encoder.init`` has filled the encoder: whatever starts as its copy is copied again."""

    def target_facts(self) -> dict[str, Any]:
        """What identifies the frozen network that gives targets; plain values, hashes of weights among them."""
        raise NotImplementedError

    def cached(self, batch: dict[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave when these views came before, if a cache is open (``target_cache``)."""
        return compute() if self.targets is None else self.targets.get(batch["place"], compute)

    def hand_over(self, folder: Path) -> dict[str, Any]:
        """Write what a finished run leaves in its folder beside the encoder.

        Args:
            folder: of the run.

        Returns:
            Plain values by name, which go into result.json.
        """
        return {}

    def lr_factor(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied with."""
        return 1.0

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, beside biases and 1-D parameters."""
        return set()

    def freeze(self, part: nn.Module) -> None:
        """Take a part out of training for good: no gradients, and in eval mode whatever ``train()`` says."""
        part.requires_grad_(False).eval()
        self._frozen.append(part)

    def train(self, mode: bool = True) -> Objective:
        """Set training mode; frozen parts stay in eval mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self
