"""Trained classifiers as teachers: a run of ours, a timm folder, or any timm model with a file of weights."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit.config import InputError, nearest
from ssl_vit.encoders.architectures import height_width
from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.files import encoder_config, load_state

OWN_PREFIX = "encoder.model."


@dataclass(frozen=True)
class Classifier:
    """A timm model that gives logits, and what it was trained on.

    Attributes:
        model: image (B, C, H, W) -> logits (B, num_classes).
        img_size: (H, W) of its images.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
    """

    model: nn.Module
    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_classifier(
    weights: str, name: str | None, num_classes: int, in_chans: int, img_size: int | tuple[int, int] | None = None
) -> Classifier:
    """Build a classifier and fill all of it, its last layer included.

    Args:
        weights: a run of ``classification`` or ``deit``, a checkpoint of one, a timm folder with a classifier, or a
            file of timm's own layout.
        name: timm architecture; None: what the run or folder says of itself.
        num_classes: logits.
        in_chans: channels of the images.
        img_size: of its images, to which positions and windows are resized; None: as it was trained.

    Raises:
        InputError: the file is missing or does not say what it holds.
        ValueError: the architecture is unknown, the weights do not fit it, or it takes no images of this size.
    """
    import timm

    stated: dict[str, Any] = {}
    with contextlib.suppress(InputError) if name else contextlib.nullcontext():
        stated = encoder_config(weights)
    if name is None:
        name, arguments = create_encoder(**stated).timm_config()
    else:
        arguments = {}
        if not timm.is_model(name):
            raise ValueError(f"teacher.name={name!r}: timm has no such model{nearest(name, timm.list_models())}")
    arguments = {**arguments, "num_classes": num_classes, "in_chans": in_chans}
    model: Any = timm.create_model(name, **arguments)
    config = model.pretrained_cfg
    state = _timm_names(load_state(weights, whole=True), config["classifier"], weights)
    _fill(model, state, f"teacher.weights={weights}", name)
    data = stated.get("data", {})
    size = height_width(img_size or stated.get("img_size", config["input_size"][-2:]))
    take_size(model, size, in_chans)
    mean, std = data.get("mean", config["mean"]), data.get("std", config["std"])
    return Classifier(model, size, tuple(mean), tuple(std))


def take_size(model: Any, size: tuple[int, int], in_chans: int) -> None:
    """Fit positions and windows of a timm model to images of another size, where it can, and try one.

    Raises:
        ValueError: it takes no images (1, in_chans, *size).
    """
    try:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)
        with torch.no_grad():
            model.eval()(torch.zeros(1, in_chans, *size))
    except (AssertionError, RuntimeError) as error:
        config = model.pretrained_cfg
        raise ValueError(
            f"teacher.img_size={list(size)}: {config['architecture']} takes no images of this size "
            f"({' '.join(str(error).split())[:200]}); it was made for {list(config['input_size'][-2:])}"
        ) from None


def _timm_names(state: dict[str, Tensor], classifier: str | tuple[str, ...], weights: str) -> dict[str, Tensor]:
    """Our checkpoint's tensors under timm's names, with its heads as timm's classifier; others as they are."""
    if not any(name.startswith(OWN_PREFIX) for name in state):
        return state
    names = (classifier,) if isinstance(classifier, str) else classifier
    found = {name.removeprefix(OWN_PREFIX): tensor for name, tensor in state.items() if name.startswith(OWN_PREFIX)}
    for head, name in zip(("head", "head_dist"), names, strict=False):
        for part in ("weight", "bias"):
            if f"{head}.{part}" not in state:
                raise ValueError(
                    f"teacher.weights={weights}: has no {head}.{part}; allowed: a run of classification (without "
                    "representation) or deit, not one without labels and not its encoder/ alone"
                )
            found[f"{name}.{part}"] = state[f"{head}.{part}"]
    return found


def _fill(model: nn.Module, state: dict[str, Tensor], where: str, name: str) -> None:
    own = model.state_dict()
    wrong = [f"{n} is missing" for n in own if n not in state] + [f"{n} is unknown" for n in state if n not in own]
    wrong += [
        f"{n} is {list(state[n].shape)} in the file, {list(own[n].shape)} here"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    if wrong:
        more = f"; ... ({len(wrong)} in all)" if len(wrong) > 4 else ""
        raise ValueError(f"{where}: does not fit {name} with the classes of this data: {'; '.join(wrong[:4])}{more}")
    model.load_state_dict(state)
