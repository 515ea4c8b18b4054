"""Many linear classifiers on parts of the same features, trained side by side by SGD with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MOMENTUM = 0.9


@dataclass(frozen=True)
class Choice:
    """One point of the grid.

    Args:
        last: blocks counted from the last whose features stand side by side.
        pool: of :data:`ssl_vit.modules.pools.POOLS`.
        rate: peak learning rate.
        decay: weight decay.
    """

    last: int
    pool: str
    rate: float
    decay: float

    def __str__(self) -> str:
        return f"last_blocks={self.last} pools={self.pool} learning_rates={self.rate} weight_decays={self.decay}"


class Group(NamedTuple):
    """Classifiers that share their input.

    Attributes:
        members: their places in the grid.
        columns: of the features, int64 (D,).
        weight: (D + 1, H, K), the last row being the bias.
        velocity: likewise.
        rates: (H, 1).
        decays: (H, 1).
    """

    members: list[int]
    columns: Tensor
    weight: Tensor
    velocity: Tensor
    rates: Tensor
    decays: Tensor

    def inputs(self, standard: Tensor) -> Tensor:
        """Their columns of standardised features (B, W), and a one for the bias."""
        return F.pad(standard[:, self.columns], (0, 1), value=1.0)

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, H, K)."""
        return (inputs @ self.weight.flatten(1)).view(len(inputs), *self.weight.shape[1:])


class LinearHeads:
    """Linear classifiers over parts of the same features.

    Args:
        features: (n, W), of which mean and spread are taken.
        grid: the classifiers.
        columns: for each (last, pool) of the grid, the columns that its classifiers see.
        num_classes: K.
    """

    def __init__(
        self, features: Tensor, grid: list[Choice], columns: dict[tuple[int, str], Tensor], num_classes: int
    ) -> None:
        self.mean, self.std = features.mean(dim=0), features.std(dim=0, unbiased=False).clamp_min(1e-6)
        self.num_classes, self.groups, like = num_classes, [], {"device": features.device, "dtype": features.dtype}
        for key, where in columns.items():
            members = [i for i, choice in enumerate(grid) if (choice.last, choice.pool) == key]
            zeros = torch.zeros(len(where) + 1, len(members), num_classes, **like)
            numbers = torch.tensor([[grid[i].rate, grid[i].decay] for i in members], **like)
            if members:
                rates, decays = numbers[:, :1], numbers[:, 1:]
                self.groups.append(Group(members, where.to(features.device), zeros, zeros.clone(), rates, decays))

    def step(self, features: Tensor, labels: Tensor, factor: float) -> None:
        """One step of SGD with momentum on the mean cross-entropy, biases not decayed.

        Args:
            features: (B, W).
            labels: int64 (B,).
            factor: of the peak learning rates.
        """
        standard = (features - self.mean) / self.std
        right = F.one_hot(labels, self.num_classes).to(standard.dtype)[:, None]
        for group in self.groups:
            inputs = group.inputs(standard)
            residual = (group.logits(inputs).softmax(dim=2) - right) / len(inputs)  # (B, H, K)
            gradient = (inputs.T @ residual.flatten(1)).view_as(group.weight)
            gradient[:-1] += group.decays * group.weight[:-1]
            group.velocity.mul_(MOMENTUM).add_(gradient)
            group.weight.addcmul_(group.velocity, group.rates * factor, value=-1.0)

    def accuracies(self, features: Tensor, labels: Tensor, chunk: int = 2048) -> list[float]:
        """Share of right predictions of each classifier."""
        right = torch.zeros(sum(len(group.members) for group in self.groups), dtype=torch.int64)
        for some, expected in zip(features.split(chunk), labels.split(chunk), strict=True):
            standard = (some - self.mean) / self.std
            for group in self.groups:
                said = group.logits(group.inputs(standard)).argmax(dim=2)
                right[group.members] += (said == expected[:, None]).sum(dim=0).cpu()
        return (right.double() / len(labels)).tolist()
