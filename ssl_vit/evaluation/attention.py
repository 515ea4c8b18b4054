"""Where an encoder looks: attention maps of each head, their mean, and attention rollout, over the image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssl_vit.config import InputError
from ssl_vit.evaluation.base import Evaluation, Subject
from ssl_vit.evaluation.pictures import fixed_images, in_eval_mode, patch_grid, sheet, shown


class _Recorder(TorchFunctionMode):
    """Keeps the probabilities of every fused attention that is computed meanwhile.

    Fused kernels never form the probabilities, so they are computed again from the same queries, keys and biases: what
    is shown is what the layer used, whatever it did to them before (normalised keys, relative positions).
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            with torch._C.DisableTorchFunction():
                self.maps.append(_probabilities(*args, **(kwargs or {})))
        return output


def _probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """softmax(q k^T scale + bias), (B, heads, T, T), in float32."""
    assert not is_causal, "no encoder here hides what comes later"
    logits = query.float() @ key.float().transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(dim=-1)


@torch.no_grad()
def attention_maps(encode: Callable[[], Any], batch_size: int) -> tuple[list[Tensor], Any]:
    """Attention probabilities (B, heads, T, T) of each layer, and what ``encode`` returned.

    Args:
        encode: runs the encoder on a batch.
        batch_size: B.

    Raises:
        InputError: the encoder's attention is not fused, within windows, or not there.
    """
    with _Recorder() as recorder:
        tokens = encode()
    if not recorder.maps or any(len(layer) != batch_size for layer in recorder.maps):
        raise InputError(
            "evals.attention: this encoder has no fused attention over the whole image (a Swin attends within windows "
            "that move from layer to layer, a ResNet not at all); allowed: vit_*, deit_*, beit_*"
        )
    return recorder.maps, tokens


def rollout(maps: list[Tensor]) -> Tensor:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928, section 3): half attention, half identity, multiplied up.

    Args:
        maps: (B, heads, T, T) of each layer, the first one first.

    Returns:
        (B, T, T): how much of each token of the input is in each token of the output; rows sum to 1.
    """
    unit = torch.eye(maps[0].shape[-1]).to(maps[0])
    total = unit.expand(len(maps[0]), -1, -1)
    for layer in maps:
        total = (layer.mean(dim=1) + unit) / 2 @ total
    return total


class Attention(Evaluation):
    """What the class token attends to (without one: the mean over the patches), a row an image.

    Columns: the image; for each layer the mean over heads and each head; rollout over all layers.

    Args:
        count: images, the same ones at every step.
        layers: which; negative ones count from the last.
        heads: also each head.
    """

    labelled = False

    def __init__(self, count: int = 4, layers: list[int] = [-1], heads: bool = True) -> None:  # noqa: B006
        if count < 1 or not layers:
            raise ValueError(f"count={count}, layers={layers}: should be at least 1, and a list such as [0, 5, -1]")
        self.count, self.layers, self.heads = count, layers, heads

    def __call__(self, subject: Subject) -> dict[str, float]:
        """Saves ``pictures/attention_XXXXXXXX.png``; no numbers."""
        batch = fixed_images(subject, self.count)
        if not batch:
            return {}
        with in_eval_mode(subject.objective):
            maps, tokens = attention_maps(lambda: subject.objective(batch, call="encode"), len(batch["image"]))
        depth, prefix = len(maps), tokens.prefix.shape[1]
        if not all(-depth <= layer < depth for layer in self.layers):
            raise InputError(f"evals.attention.layers={self.layers}: allowed: {-depth} to {depth - 1}")
        chosen = []  # (B, N) each
        for layer in self.layers:
            seen = _seen(maps[layer], prefix)  # (B, heads, N)
            chosen += [seen.mean(dim=1), *(seen.unbind(dim=1) if self.heads else ())]
        chosen.append(_seen(rollout(maps)[:, None], prefix)[:, 0])
        picture = shown(batch["image"], subject.pixels)
        subject.picture("attention", sheet([picture, *(overlay(picture, values.cpu()) for values in chosen)]))
        return {}


def _seen(maps: Tensor, prefix: int) -> Tensor:
    """(B, heads, T, T) to (B, heads, N): what the class token, or the mean patch, takes from each patch."""
    rows = maps[:, :, 0] if prefix else maps.mean(dim=2)
    return rows[..., prefix:]


def overlay(picture: Tensor, values: Tensor) -> Tensor:
    """uint8 (B, 3, H, W): values of patches (B, N), largest bright, over a faint grey picture uint8 (B, 3, H, W)."""
    from matplotlib import colormaps

    grid = patch_grid(values[..., None].float(), picture)  # (B, 1, h, w)
    smooth = F.interpolate(grid, picture.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = smooth.amin(dim=(1, 2), keepdim=True), smooth.amax(dim=(1, 2), keepdim=True)
    shown = ((smooth - low) / (high - low).clamp_min(1e-12)).numpy()
    colours = torch.from_numpy(np.asarray(colormaps["inferno"](shown))[..., :3]).permute(0, 3, 1, 2) * 255
    grey = picture.float().mean(dim=1, keepdim=True)
    return (0.7 * colours.float() + 0.3 * grey).round().clamp(0, 255).to(torch.uint8)
