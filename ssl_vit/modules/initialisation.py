"""Published initialisations of whole networks."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

TOKENS = ("cls_token", "reg_token", "mask_token")
RESIDUAL = re.compile(r"(?:^|\.)(\d+)\.(attn\.proj|mlp\.fc2)\.weight$")


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


@torch.no_grad()
def initialise_beit(network: nn.Module, std: float = 0.02) -> None:
    """BEiT's initialisation for pretraining (arXiv 2106.08254, section 2.5, and the released code).

    Linear layers, convolutions, tokens and learned positions normal, cut at one standard deviation; biases 0; LayerNorm
    1 and 0; then the last layers of both residual branches of block l are divided by the root of 2 l. Tables of
    relative positions and layer scale are left as they are.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=std, a=-std, b=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        if name.rpartition(".")[2] in (*TOKENS, "pos_embed") and parameter.requires_grad:
            nn.init.trunc_normal_(parameter, std=std, a=-std, b=std)
    scale_residuals(network)


@torch.no_grad()
def scale_residuals(network: nn.Module, first: int = 1) -> None:
    """Divide the last layers of both residual branches by the root of twice the number of their block.

    Args:
        network: its blocks are numbered, e.g. ``blocks.0``, or ``0`` in a list of blocks.
        first: number of the first block.
    """
    for name, parameter in network.named_parameters():
        if found := RESIDUAL.search(name):
            parameter.div_(math.sqrt(2 * (int(found[1]) + first)))
