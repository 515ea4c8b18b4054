"""The optimizer and its parameter groups."""

# pyright: reportPrivateImportUsage=false
# torch has no public names for its operations on lists of tensors
from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ssl_vit.config import Duration, DurationField, Section
from ssl_vit.encoders.base import Encoder
from ssl_vit.training.schedules import warmup_cosine


class OptimSection(Section):
    """The optimizer and its schedule.

    Args:
        name: adamw; sgd; lars: SGD whose step is scaled to each weight matrix (arXiv 1708.03888), trust 0.001, biases
            and other one-dimensional parameters as in SGD
        batch_size: images a step, over all devices
        epochs: length of the training
        base_lr: peak learning rate per lr_divisor images
        lr_divisor: lr = base_lr * batch_size / lr_divisor; null: base_lr is absolute
        min_lr: absolute learning rate at the end
        warmup_epochs: linear warm-up from warmup_lr
        warmup_lr: absolute learning rate before the first step
        schedule: after the warm-up, per step
        milestones: of the multistep schedule
        gamma: factor of the multistep schedule at each milestone
        weight_decay: not applied to biases and other one-dimensional parameters
        weight_decay_end: weight decay at the end, reached per step on half a cosine; null: constant
        layer_decay: each layer of the encoder learns with this factor of the layer above it, a classifier with the
            whole learning rate; null: all alike
        betas: AdamW's; SGD and LARS use the first as momentum
        eps: AdamW's
        clip_grad: largest norm of the gradients; null: no clipping
        clip_mode: norm: all gradients together; per_parameter: the gradient of each parameter for itself
        max_skips: after so many steps in a row with a loss or gradients that are not finite, go back to a checkpoint
    """

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    batch_size: int = Field(default=4096, ge=1)
    epochs: DurationField = Duration(800, "epochs")
    base_lr: float = Field(default=1.5e-4, gt=0)
    lr_divisor: int | None = Field(default=256, ge=1)
    min_lr: float = Field(default=0.0, ge=0)
    warmup_epochs: DurationField = Duration(40, "epochs")
    warmup_lr: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "constant", "multistep"] = "cosine"
    milestones: list[DurationField] = Field(default_factory=list)
    gamma: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    weight_decay_end: float | None = Field(default=None, ge=0)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad: float | None = Field(default=None, gt=0)
    clip_mode: Literal["norm", "per_parameter"] = "norm"
    max_skips: int = Field(default=10, ge=1)

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("should be two numbers of at least 0 and below 1")
        return betas

    @model_validator(mode="after")
    def _milestones(self) -> OptimSection:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError("milestones belong to schedule=multistep, which needs at least one, e.g. milestones=[700]")
        return self


def absolute_lr(optim: OptimSection) -> float:
    """The peak learning rate: ``base_lr * batch_size / lr_divisor``, the batch being the global one."""
    return optim.base_lr * (optim.batch_size / optim.lr_divisor if optim.lr_divisor else 1.0)


def is_decayed(name: str, parameter: nn.Parameter, exempt: frozenset[str] | set[str] = frozenset()) -> bool:
    """Weight decay spares biases and other one-dimensional parameters, and the names an objective exempts.

    The class token and the mask token are three-dimensional, so MAE's published run decays them.
    """
    return parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt


def layer_of(objective: nn.Module, name: str) -> tuple[int, int]:
    """The layer of an objective's parameter and the number of the last: heads are there, a student is its encoder."""
    encoder = objective.encoder
    assert isinstance(encoder, Encoder)
    part, _, rest = name.partition(".")
    return (encoder.layer_of(rest) if part in ("encoder", "student") else encoder.num_layers), encoder.num_layers


def parameter_groups(objective: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict]:
    """Groups of the trainable parameters: decayed and not, and by layer where ``layer_decay`` tells them apart.

    Each lists its ``names`` in the module's order. A layer that lies k below the last has ``lr_scale`` =
    ``layer_decay ** k`` (BEiT, arXiv 2106.08254, section A; MAE's and SimMIM's fine-tuning).
    """
    exempt = objective.no_weight_decay()  # pyright: ignore[reportCallIssue]
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = objective.lr_factor(name)  # pyright: ignore[reportCallIssue]
        if layer_decay is not None:
            layer, last = layer_of(objective, name)
            scale *= layer_decay ** (last - layer)
        decayed = is_decayed(name, parameter, exempt)
        group = groups.setdefault(
            (not decayed, -scale),
            {
                "params": [], "names": [], "weight_decay": weight_decay if decayed else 0.0, "decayed": decayed,
                "lr_scale": scale,
            },
        )  # fmt: skip
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(objective: nn.Module, optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW (fused), SGD or LARS over :func:`parameter_groups`, at the peak learning rate."""
    groups = parameter_groups(objective, optim.weight_decay, optim.layer_decay)
    if not groups:
        raise ValueError("the objective has no trainable parameters")
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=absolute_lr(optim), momentum=optim.betas[0], fused=True)
    if optim.name == "lars":
        from ssl_vit.training.lars import LARS

        lars: Any = LARS
        for group in groups:  # as MAE has it: what is not decayed is not adapted either
            group["always_adapt"] = group["decayed"]
        return lars(groups, lr=absolute_lr(optim), momentum=optim.betas[0])
    return torch.optim.AdamW(groups, lr=absolute_lr(optim), betas=optim.betas, eps=optim.eps, fused=True)


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros as the first momentum of SGD and LARS, which the first step makes its gradient.

    torch's fused SGD would take memory as it comes, and keep it where the first step is skipped.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        for parameter in (p for group in optimizer.param_groups if group["momentum"] for p in group["params"]):
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def set_schedule(groups: list[dict[str, Any]], optim: OptimSection, lr: float, fraction: float) -> None:
    """Give the optimizer's groups the learning rate and weight decay of a step.

    Args:
        groups: of :func:`parameter_groups`; a group's ``lr_scale`` multiplies its learning rate.
        optim: the recipe's section.
        lr: learning rate of the step.
        fraction: share of the run done, 0 to 1.
    """
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if optim.weight_decay_end is not None and group["decayed"]:
            # half a cosine without warm-up (DINO, arXiv 2104.14294, section 3.2)
            group["weight_decay"] = warmup_cosine(fraction, 1.0, 0.0, optim.weight_decay, optim.weight_decay_end)


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], norm: Tensor, optim: OptimSection) -> None:
    """Clip the gradients as the recipe says; nothing waits for the device.

    Args:
        parameters: those without a gradient are left out.
        norm: of all gradients together, ().
        optim: the recipe's section; without ``clip_grad`` nothing is clipped.
    """
    if optim.clip_grad is None:
        return
    if optim.clip_mode == "norm":
        torch.nn.utils.clip_grads_with_norm_(parameters, optim.clip_grad, norm, foreach=True)
        return
    # DINO's and iBOT's published way: min(1, clip / (norm + 1e-6)) of each parameter for itself
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((optim.clip_grad / (norms + 1e-6)).clamp(max=1.0).unbind()))
