"""Ways to make one feature of an image from its tokens, as probes have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_vit.config import nearest
from ssl_vit.encoders.base import Tokens

POOLS = ("token", "avg", "both")
"""Of each block: its class token, the mean of its patches, or both side by side."""
TOKENS_AVG = "tokens_avg"
"""The class tokens of all blocks, and the mean of the last one's patches (DINOv2, arXiv 2304.07193)."""
OWN, ATTENTIVE = "pool", "attentive"
"""The encoder's own feature of its last block, and a learned query that attends to the patches."""


def pooled(tokens: Tokens, pool: str) -> Tensor:
    """The class token, the mean of the patches, or both side by side, (B, D) or (B, 2 D).

    Raises:
        ValueError: the encoder has no class token.
    """
    if pool != "avg" and not tokens.prefix.shape[1]:
        raise ValueError(f"pool={pool!r}: this encoder has no class token; allowed: avg")
    parts = {"token": lambda: tokens.prefix[:, 0], "avg": lambda: tokens.patches.mean(dim=1)}
    return torch.cat([part() for name, part in parts.items() if pool in (name, "both")], dim=1)


def side_by_side(tokens: Sequence[Tokens], pool: str) -> Tensor:
    """One feature of the tokens of several blocks, (B, D)."""
    if pool != TOKENS_AVG:
        return torch.cat([pooled(found, pool) for found in tokens], dim=1)
    return torch.cat([*(pooled(found, "token") for found in tokens), pooled(tokens[-1], "avg")], dim=1)


def check_pools(pools: Sequence[str], allowed: Sequence[str] = POOLS) -> None:
    """Refuse what is not a way of pooling.

    Raises:
        ValueError: naming it.
    """
    wrong = [pool for pool in pools if pool not in allowed]
    if wrong or not pools:
        hint = nearest(wrong[0], allowed) if wrong else ""
        raise ValueError(f"pools={list(pools)}: allowed: some of {', '.join(allowed)}{hint}")
