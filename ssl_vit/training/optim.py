"""The optimizer and its parameter groups."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from ssl_vit.config import Duration, DurationField, Section


class OptimSection(Section):
    """The optimizer and its schedule.

    Args:
        name: optimizer
        batch_size: images a step, over all devices
        epochs: length of the training
        base_lr: peak learning rate per lr_divisor images
        lr_divisor: lr = base_lr * batch_size / lr_divisor; null: base_lr is absolute
        min_lr: absolute learning rate at the end
        warmup_epochs: linear warm-up from 0
        schedule: after the warm-up, per step
        weight_decay: not applied to biases and other one-dimensional parameters
        betas: AdamW's; SGD uses the first as momentum
        eps: AdamW's
        clip_grad: largest norm of all gradients together; null: no clipping
        max_skips: after so many steps in a row with a loss or gradients that are not finite, go back to a checkpoint
    """

    name: Literal["adamw", "sgd"] = "adamw"
    batch_size: int = Field(default=4096, ge=1)
    epochs: DurationField = Duration(800, "epochs")
    base_lr: float = Field(default=1.5e-4, gt=0)
    lr_divisor: int | None = Field(default=256, ge=1)
    min_lr: float = Field(default=0.0, ge=0)
    warmup_epochs: DurationField = Duration(40, "epochs")
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad: float | None = Field(default=None, gt=0)
    max_skips: int = Field(default=10, ge=1)

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("should be two numbers of at least 0 and below 1")
        return betas


def absolute_lr(optim: OptimSection) -> float:
    """The peak learning rate: ``base_lr * batch_size / lr_divisor``, the batch being the global one."""
    return optim.base_lr * (optim.batch_size / optim.lr_divisor if optim.lr_divisor else 1.0)


def is_decayed(name: str, parameter: nn.Parameter, exempt: frozenset[str] | set[str] = frozenset()) -> bool:
    """Weight decay spares biases and other one-dimensional parameters, and the names an objective exempts.

    The class token and the mask token are three-dimensional, so MAE's published run decays them.
    """
    return parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt


def parameter_groups(objective: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups of the trainable parameters, decayed and not; each lists its ``names`` in the module's order."""
    exempt = objective.no_weight_decay()  # pyright: ignore[reportCallIssue]
    trainable = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    groups = []
    for decayed in (True, False):
        chosen = [(name, p) for name, p in trainable if is_decayed(name, p, exempt) is decayed]
        if chosen:
            groups.append(
                {
                    "params": [p for _, p in chosen],
                    "names": [name for name, _ in chosen],
                    "weight_decay": weight_decay if decayed else 0.0,
                }
            )
    return groups


def build_optimizer(objective: nn.Module, optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW (fused) or SGD over :func:`parameter_groups`, at the peak learning rate."""
    groups = parameter_groups(objective, optim.weight_decay)
    if not groups:
        raise ValueError("the objective has no trainable parameters")
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=absolute_lr(optim), momentum=optim.betas[0], fused=True)
    return torch.optim.AdamW(groups, lr=absolute_lr(optim), betas=optim.betas, eps=optim.eps, fused=True)
