"""Published initialisations of whole networks."""

from __future__ import annotations

import torch
from torch import nn

TOKENS = ("cls_token", "reg_token", "mask_token")


@torch.no_grad()
def initialise_mae(network: nn.Module) -> None:
    """MAE's initialisation (arXiv 2111.06377, section A.1, "Xavier uniform").

    Linear layers xavier-uniform (q, k, v as one matrix) with zero bias; convolutions as if they were Linear;
    LayerNorm 1 and 0; class, register and mask tokens normal with standard deviation 0.02. Position tables are left
    as they are.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        if name.rpartition(".")[2] in TOKENS:
            nn.init.normal_(parameter, std=0.02)
