"""Parameters, FLOPs and activations of an objective, counted with tensors that have shapes but no memory."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssl_vit.recipe import Recipe

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DENSE_PEAK = {
    "B200": 2250.0, "H200 NVL": 835.0, "H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4,
    "A100": 312.0, "L40S": 362.0, "L4": 121.0,
}  # fmt: skip
"""bf16 TFLOP/s without sparsity, from the makers' data sheets, by a part of the device's name; the first that fits."""


@dataclass(frozen=True)
class Cost:
    """What one objective costs, counted without allocating it.

    Args:
        encoder: parameters of the encoder.
        total: parameters of the objective.
        trainable: those with gradients.
        gathered: parameters outside the transformer blocks, and of the largest block.
        flops: of a training step, per image (forward and backward, GEMMs and attention).
        activations: bytes kept for the backward pass: (fixed, per image).
        checkpointed: the same with ``encoder.grad_checkpointing``, None where the encoder has no such thing.
    """

    encoder: int
    total: int
    trainable: int
    gathered: tuple[int, int]
    flops: float
    activations: tuple[float, float]
    checkpointed: tuple[float, float] | None


def count(recipe: Recipe) -> Cost:
    """Count parameters, FLOPs and activations of a recipe's objective with fake tensors."""
    import torch

    from ssl_vit.training.strategies import transformer_blocks

    torch.manual_seed(recipe.seed)
    objective, run = _fake(recipe)
    flops, two = run(2)
    _, four = run(4)
    checkpointed = None
    if "grad_checkpointing" in recipe.encoder:
        other = copy.deepcopy(recipe)
        other.encoder["grad_checkpointing"] = True
        _, run_checkpointed = _fake(other)
        checkpointed = _line(run_checkpointed(2)[1], run_checkpointed(4)[1])
    sizes = [sum(p.numel() for p in block.parameters()) for block in transformer_blocks(objective)]
    total = sum(p.numel() for p in objective.parameters())
    return Cost(
        encoder=sum(p.numel() for p in objective.encoder.parameters()),
        total=total,
        trainable=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        gathered=(total - sum(sizes), max(sizes, default=0)),
        flops=flops / 2,
        activations=_line(two, four),
        checkpointed=checkpointed,
    )


def flops(recipe: Recipe) -> float:
    """FLOPs of a training step, per image, without what activation checkpointing computes again."""
    recipe = copy.deepcopy(recipe)
    recipe.encoder = {key: value for key, value in recipe.encoder.items() if key != "grad_checkpointing"}
    _, run = _fake(recipe)
    return run(2)[0] / 2


def dense_peak(name: str) -> float | None:
    """FLOP/s in bf16 of a GPU of that name; None: not known, or a part of one."""
    found = (value for key, value in DENSE_PEAK.items() if re.search(rf"\b{key}\b", name))
    peak = None if "MIG" in name else next(found, None)
    return peak and peak * 1e12


def peak_rate(recipe: Recipe, device: torch.device) -> float | None:
    """Images/s at which a GPU would compute at its dense bf16 peak; None, said in the log: it cannot be known."""
    import torch

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = dense_peak(name)
    if peak is None or recipe.objective.get("target_cache"):
        reason = f"the peak of {name} is not known here" if peak is None else "a cache gives some targets"
        logger.info("mfu is not logged: %s", reason)
        return None
    try:
        return peak / flops(recipe)
    except Exception as error:  # a number in the log is no reason not to train
        logger.warning("mfu is not logged: the FLOPs of a step cannot be counted: %s", error)
        return None


def _line(two: float, four: float) -> tuple[float, float]:
    """(fixed, per image) from the bytes at two batch sizes."""
    slope = (four - two) / 2
    return two - 2 * slope, slope


def _fake(recipe: Recipe) -> tuple[Any, Callable[[int], tuple[float, float]]]:
    """The objective without memory, and a function of the batch size: (FLOPs of a step, bytes of activations)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe = copy.deepcopy(recipe)
    recipe.encoder["init"] = recipe.objective["init"] = None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return step_counter(recipe, mode)


def step_counter(recipe: Recipe, mode: Any = None) -> tuple[Any, Callable[[int], tuple[float, float]]]:
    """As :func:`_fake`, with real tensors if there is no ``mode``; autocast as the recipe says."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ssl_vit import build
    from ssl_vit.objectives.base import Progress
    from ssl_vit.training.strategies import transformer_blocks

    with torch.device("cpu" if mode is None else "meta"), warnings.catch_warnings():
        # a teacher's weights go nowhere, and need not
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        objective = build.build_objective(recipe).train()
    if mode is not None:
        with mode:
            objective.to_empty(device="cpu")  # fake: shapes without memory
    kept: dict[int, int] = {}
    own: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    for block in transformer_blocks(objective):
        # what a checkpointed block keeps: its input
        block.register_forward_pre_hook(lambda module, inputs: (keep(inputs[0]), None)[1])

    def run(batch_size: int) -> tuple[float, float]:
        batch = blank_batch(objective, recipe, batch_size, "cpu")
        if mode is not None:
            batch = {key: mode.from_tensor(value) for key, value in batch.items()}
        kept.clear()
        own.clear()
        own.update(t.untyped_storage()._cdata for t in (*objective.parameters(), *objective.buffers()))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed_precision == "bf16")
        counter = FlopCounterMode(display=False, custom_mapping=_attention_flops())
        with mode or nullcontext(), counter:
            # not the first step, in which a codebook looks at values
            objective.before_step(Progress(1, 100, 0.01, 1.0, 0.01))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                loss, _ = objective(batch, call="loss")
            loss.backward()
        objective.zero_grad(set_to_none=True)
        return counter.get_total_flops(), float(sum(kept.values()))

    return objective, run


def blank_batch(objective: Any, recipe: Recipe, batch_size: int, device: str) -> dict[str, Any]:
    """The objective's own views of a black image, as the loader would give them."""
    import torch

    from ssl_vit import build

    pixels = build.resolve_pixels(copy.deepcopy(recipe.data), recipe.encoder)
    blank = torch.zeros(pixels.in_chans, *objective.encoder.img_size, dtype=torch.uint8)
    view = objective.views(objective.encoder.img_size)
    views = [view({"image": blank, "label": 0}) for _ in range(batch_size)]
    batch = {key: torch.stack([v[key] for v in views]) for key in views[0]}
    return pixels.to_device(batch, torch.device(device))


def _attention_flops() -> dict[Any, Callable[..., int]]:
    """The CPU's fused attention, which torch's counter does not know; backward is twice forward, as for GEMMs."""
    import torch
    from torch.utils.flop_counter import sdpa_flop_count

    def forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * sdpa_flop_count(q, k, v)

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
